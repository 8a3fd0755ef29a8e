# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands, where people meet the machine.

Three commands and no decisions of their own: each one reads its arguments, calls the chapters below,
and prints their answers.

    mount.pkramfs     as mount(8) calls it: mount, remount,preserve,ro, remount,rw        mount.py, remount.py
    pkram-kexec       with kexec(8)'s spelling: load an image, boot it over this kernel   kexec.py, executing.py
    pkramctl          a window into the machine, its kernel, its nodes and its memory     ctl.py
    python -m pkramfs boot DIR      a fresh process that knows nothing, started by pkram-kexec    boot.py

Composition happens here because no chapter below may do it: `kernel` plans a kexec but does not know that
mounts are served by daemons, `control` talks to daemons but does not know what a kexec is. So
`pkram-kexec -e` asks every daemon to freeze, hands the answers to the planner as plain
`MountReport`s, and gives it callables that stop and thaw.

    arguments   shared options, exit statuses, errors as one line
    logs        -v and --log-json
    signals     signals: undo the command, or wait until its end
    render      tables for people, the same as JSON for programs
    destination a file that appears whole, or not at all
    progress    a bar on a terminal, lines for programs
    daemons     the mount daemons of a machine: find them, ask them
    freezer     all mounts of a machine on the way through a kexec: freeze, thaw, stop
    hostkexec   pkram-kexec on memory that outlives the host's kernel: kexec(8) and systemd
    again       plan which mounts come back after a kexec, and mount them
    drawing     sheets of SVG
    users       the programs that use a mount
    nodes       list and free preserved nodes                  ┐
    status      everything at a glance                         │
    inspect     a record in memory, field by field             │
    verify      check all that would cross a kexec             ├ pkramctl's subjects
    report      the last boot                                  │
    maps        RAM as a picture; mapsheet: as SVG             │
    ramview     the view that both of them show                │
    timeline    kernels one after the other; timesheet: as SVG │
    generations the records that both of them show             │
    metrics     measures for Prometheus, printed; serving      │
    installing  what belongs in place; completions for shells  │
    overview    --help of pkramctl on one screen               │
    booting     the boot without a mount                       │
    doctor      what is lacking here; checkup: on any host;    │
                reserving: to survive a kexec of the host      │
    files       holes in files on a mount                      │
    freeing     give nodes up, or list what would go           │
    trees       look, archives, compare, copies: what is in    │
                preserved trees, which opening finds           │
    hardware    make, show and remove machines                 ┘

Promises of every command:

* An error is one line on stderr, `pkram-kexec: what, where, what to do`, and the exit status of
  the error's class (errors.py). A traceback is only for --debug.
* SIGINT, SIGTERM and SIGHUP undo the command, or wait where it cannot be undone; the status is 128 plus the signal's
  number. A closed pipe is no error.
* `--help` costs no more than Python and argparse: these modules import at their top only the standard library,
  mounting/ and the light modules (units, errors, text, stdio, schema); functions import numpy, trio and rich.
* Looking changes nothing: `pkramctl status`, `--dry-run` and `--status` neither boot nor freeze.

Counterparts: util-linux sys-utils/mount.c and kexec-tools kexec/kexec.c
"""
