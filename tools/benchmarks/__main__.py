# SPDX-License-Identifier: GPL-2.0-or-later
"""The command: which sections, how often, where to."""

import argparse
import signal
import sys

from benchmarks.table import Table

SECTIONS = ("rfc", "scale", "pause", "io", "meta", "memory", "start", "live", "sums", "peers")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description="Measure pkramfs beside its references.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--runs", type=int, default=5, help="runs of each figure (default: 5)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    if args.runs < 1:
        parser.error(f"--runs {args.runs}: at least one run is needed")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # timeout(1), and the mounts are to go
    table = Table(args.runs, args.quick)
    if args.json:
        try:
            table.write_json(args.json)  # not to find out in half an hour that it cannot be
        except OSError as error:
            parser.error(f"--json {args.json}: {error.strerror}")
    try:
        for name in args.sections or SECTIONS:
            section(name)(table)
    except KeyboardInterrupt:
        print("tools/bench: interrupted", file=sys.stderr)
        return 130
    finally:
        if args.json:
            table.write_json(args.json)
    print(table.verdict())
    return 0


def section(name: str):  # type: ignore[no-untyped-def]
    from benchmarks import core, files, living, peers, space, sums, users

    for module in (core, users, files, space, living, sums, peers):
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(name)


if __name__ == "__main__":
    sys.exit(main())
