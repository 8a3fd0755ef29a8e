# SPDX-License-Identifier: GPL-2.0-or-later
"""The streams of an object, written and read.

writer      one object: bytewriter, pagewriter       reader      one object, checked whole
linkwriter  rows of blocks to links                  linkreader  a chain of links, checked
link        a link page, and how it is made          runs        the runs in the links of a chain
scattered   the same for single pages                columns, completeness, indices
"""
