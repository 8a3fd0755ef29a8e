"""The benchmark: sections of figures, each beside a reference that was measured in the same run.

Machines are noisy, so a figure alone means little: every figure is the median of several runs, with
minimum and maximum, and stands next to what the same machine does in the same minute without us: a
kernel tmpfs, a plain first touch of as many bytes, a bare Python start. Targets are ratios where a
reference exists.

    table    Figure, Table: collecting, printing, JSON
    core     rfc, scale: save and load of huge trees, on sparse RAM, without FUSE
    users    pause, start: whole commands on real mounts
    files    io, meta: against a kernel tmpfs
    space    memory: what a mount, a file, a GiB cost
"""
