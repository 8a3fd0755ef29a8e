# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark: sections of figures, each beside a reference that was measured in the same run.

Machines are noisy, so a figure alone means little: every figure is the median of several runs, with
minimum and maximum, and stands next to what the same machine does in the same minute without us: a
kernel tmpfs, a plain first touch of as many bytes, a bare Python start. Targets are ratios where a
reference exists; where the way through FUSE sets the limit, a file system that does nothing shows it.

    table    Figure, Table: collecting, printing, JSON
    core     rfc, scale: save and load of huge trees, on sparse RAM, without FUSE
    users    pause, start: whole commands on real mounts
    files    io, meta: against a kernel tmpfs and the floor
    floor    the least that a file system can do behind this door
    space    memory: what a mount, a file, a GiB cost
"""
