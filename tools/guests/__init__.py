# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that boot real kernels: the steps of the announcement, with a real kexec in the middle.

packages.py   kernels and a userland, as Debian packages, unpacked into a directory of our own
image.py      an initial RAM disk with the few modules that are needed, and a disk with userland and pkramfs
__main__.py   QEMU (by software emulation), what the guest says, PASS or FAIL
init walk.py  what runs in the guest: the initial RAM disk's /init, and the user at the keyboard
"""
