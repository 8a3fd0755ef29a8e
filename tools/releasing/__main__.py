# SPDX-License-Identifier: GPL-2.0-or-later
"""Build what is released, and say the digest of each file.

tools/package                    source distribution and wheel, into build/dist
tools/package deb --check        a Debian source package and a .deb, built, examined and tried in chroots (root)
tools/package --twice            twice, under other circumstances: the bytes must be the same

Chroots stay in --cache.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from releasing import checks, chroots, debian, sources
from releasing.sources import BuildError

KINDS = ("sdist", "wheel", "deb")


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
    parser.add_argument("--check", action="store_true", help="install, try and purge the .deb in a fresh chroot")
    parser.add_argument("--suite", default=debian.SUITE, help=f"Debian's, for deb (default: {debian.SUITE})")
    parser.add_argument(
        "--cache", type=Path, default=Path(os.path.expanduser("~/.cache/pkramfs-chroots")), metavar="DIR"
    )
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"unknown kind {min(unknown)!r}: {', '.join(KINDS)} are known")
    args.kinds = args.kinds or ["sdist", "wheel"]
    if args.check and "deb" not in args.kinds:
        parser.error("--check is for deb; tools/test --installed tries the wheel")
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
    for kind, path in zip(KINDS, made, strict=False):
        if kind in args.kinds:
            show(Path(shutil.copy(path, args.out)))
    if "deb" in args.kinds:
        package(args, made[0], work)


def package(args: argparse.Namespace, distribution: Path, work: Path) -> None:
    """Build, compare and check the Debian packages."""
    args.cache.mkdir(parents=True, exist_ok=True)
    builder = debian.chroot(args.cache, args.suite, work / "builder")
    made = debian.build(distribution, work / "debs", builder)
    if args.twice:
        compare(made, debian.build(distribution, work / "debs-again", builder, where="another/place", mask="077"))
    for path in made:
        show(Path(shutil.copy(path, args.out)))
    if args.check:
        print(checks.lintian(made, builder), end="")
        (deb,) = (path for path in made if path.suffix == ".deb")
        checks.walk(deb, chroots.base(args.cache, args.suite).copy(work / "fresh"))
        say(f"{deb.name} was installed, tried and purged in {args.suite}")


def compare(first: Sequence[Path], second: Sequence[Path]) -> None:
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
