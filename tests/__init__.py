# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests, a package so that no other on the path takes the name; see CONTRIBUTING.md for the chapters."""
