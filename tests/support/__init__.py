# SPDX-License-Identifier: GPL-2.0-or-later
"""What several chapters' tests share.

lab       Lab: the commands that are typed at one machine. Each chapter lays a layer on it:
            Boots (tests/kernel)        boots run in this process, and may die after any step
            Mounts (tests/mount)        real mounts, taken down whatever happens
            Pairs (tests/conformance)   a kernel tmpfs beside each mount
            User (tests/kexec)          the installed programs, as a user types them
trees     fill() makes an awkward tree, snapshot() tells all that must survive of one
places    what is mounted, waiting for the end of a process, taking both down
    damage    the JSON files of a machine, and where each may be damaged
"""
