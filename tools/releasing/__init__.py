# SPDX-License-Identifier: GPL-2.0-or-later
"""What is released, and that it is whole.

sources.py    a clean copy of the checkout ─▶ source distribution ─▶ wheel, the same bytes each time
debian.py     the source distribution and ../debian ─▶ Debian source package ─▶ .deb, built in a chroot
chroots.py    chroots of a Debian suite, made once by debootstrap and copied for each use
checks.py     a .deb in a fresh chroot: installed, walked through, purged
"""
