# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of preserved pages that hangs off each node: reader (and what it looks like), writer."""
