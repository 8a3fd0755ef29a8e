# SPDX-License-Identifier: GPL-2.0-or-later
"""Build what is released, and say the digest of each file.

tools/package                    source distribution and wheel, into build/dist
tools/package --twice            twice, under other circumstances: the bytes must be the same
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

from releasing import sources
from releasing.sources import BuildError

KINDS = ("sdist", "wheel")


def main() -> int:
    args = parse()
    work = Path(tempfile.mkdtemp(prefix="pkramfs-package-"))
    try:
        run(args, work)
    except BuildError as error:
        say(error)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


def parse() -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="package", description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default: sdist wheel)")
    parser.add_argument("--out", type=Path, default=sources.TOP / "build" / "dist", metavar="DIR")
    parser.add_argument("--twice", action="store_true", help="build again and compare")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"unknown kind {min(unknown)!r}: {', '.join(KINDS)} are known")
    args.kinds = args.kinds or ["sdist", "wheel"]
    return args


def run(args: argparse.Namespace, work: Path) -> None:
    """Build what is asked for."""
    if changed := sources.changed():
        say(f"{len(changed)} files differ from the last commit, {changed[0].split()[-1]} first: no release")
    made = sources.build(work / "made", work / "first")
    if args.twice:
        other = {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "7", "HOME": str(work)}
        compare(made, sources.build(work / "again", work / "second" / "deeper", mask=0o077, **other))
    args.out.mkdir(parents=True, exist_ok=True)
    for kind, path in zip(KINDS, made, strict=True):
        if kind in args.kinds:
            show(Path(shutil.copy(path, args.out)))


def compare(first: tuple[Path, ...], second: tuple[Path, ...]) -> None:
    """Raise BuildError for files that should be the same."""
    for one, other in zip(first, second, strict=True):
        if digest(one) != digest(other):
            raise BuildError(f"{one.name} is another one each time: {digest(one)} and {digest(other)}")
        say(f"{one.name} is the same, built twice")


def show(path: Path) -> None:
    """Print a file's digest and size."""
    print(f"{digest(path)}  {path.stat().st_size:9,}  {path}")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say(*words: object) -> None:
    print("package:", *words, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
