# SPDX-License-Identifier: GPL-2.0-or-later
"""Chapter 7: the commands, where people meet the machine.

Three commands and no decisions of their own: each one reads its arguments, composes what the
chapters below offer, and prints what they answer.

    mount.pkramfs     as mount(8) calls it: mount, remount,preserve,ro, remount,rw        mount.py, remount.py
    pkram-kexec       with kexec(8)'s spelling: load an image, die, be born again         kexec.py
    pkramctl          a window into the machine, its kernel, its nodes and its memory     ctl.py
    python -m pkramfs boot DIR      what pkram-kexec starts: a fresh process that knows nothing   boot.py

Composition happens here because nobody below may: `kernel` plans a kexec but does not know that
mounts are served by daemons, `control` talks to daemons but does not know what a kexec is. So
`pkram-kexec -e` asks every daemon to freeze, hands the answers to the planner as plain
`MountReport`s, and gives it callables that stop and thaw.

    arguments   shared options, exit statuses, errors as one line
    signals     what a signal does to a command, and where it has to wait
    render      tables for people, the same as JSON for programs
    mounts      all mounts of a machine at once: ask, freeze, thaw, stop, start again
    nodes       what is preserved: list and free               ┐
    status      everything at a glance                         │
    inspect     a record in memory, field by field             ├ pkramctl's subjects
    verify      all that would cross a kexec, checked          │
    hardware    machines made, shown, removed                  ┘

Promises of every command:

* An error is one line on stderr, `pkram-kexec: what, where, what to do`, and an exit status that
  the class of the error knows (errors.py). A traceback is only for --debug.
* SIGINT, SIGTERM and SIGHUP take back what was begun, or wait where that cannot be done; the status is 128 and the
  signal's number. A closed pipe is silent.
* `--help` costs no more than Python and argparse: at the top of these modules stand only the
  standard library and the prelude; numpy, trio and rich are imported where they are used.
* What looks changes nothing: `pkramctl status`, `--dry-run` and `--status` neither boot nor freeze.

Kernel: util-linux sys-utils/mount.c and kexec-tools kexec/kexec.c stand where this chapter does
"""
