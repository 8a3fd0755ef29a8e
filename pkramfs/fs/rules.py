# SPDX-License-Identifier: GPL-2.0-or-later
"""Limits of every tree: operations enforce them, and a restore verifies them.

Kernel: include/uapi/linux/limits.h, include/uapi/linux/xattr.h, mm/shmem.c
"""

ROOT_INO = 1
WRITING = 1 << 62
"""Set in the handle of a file that is open for writing."""
UNNOTED = 1 << 61
"""Set in the handle of a file that was opened with O_NOATIME."""
DIRECT = 1 << 60
"""Set in the handle of a file that was opened with O_DIRECT."""
INO_MASK = DIRECT - 1

MAX_SIZE = (1 << 63) - 1
NAME_MAX = 255
TARGET_MAX = 4095
XATTR_NAME_MAX, XATTR_SIZE_MAX = 255, 65536
LABEL = b"security.selinux"
"""The xattr that ls(1) asks for of each file."""

EMPTY_DIRECTORY_SIZE = 40
ENTRY_SIZE = 20
"""st_size of a directory: 20 bytes for each entry, `.` and `..` included, as tmpfs says."""
FIRST_COOKIE = 3
"""The first cookie that a directory gives to an entry."""
