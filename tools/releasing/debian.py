# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian source package, made of the source distribution and ../debian, and the .deb that is built of it.

    .tar.gz ──rename──▶ pkramfs_V.orig.tar.gz ┐
    tools/debian ──fill in version, date──▶ debian/ ┴─dpkg-buildpackage in a chroot─▶ .dsc, .debian.tar.xz, .deb

What Debian has as packages is depended upon, nothing is bundled: python3-pyfuse3 and python3-trio are recent enough in
trixie and later. The version is the release's, or, of a checkout between releases, that and the day of its last commit.
"""

import os
import shutil
import tarfile
import time
from email.utils import formatdate
from pathlib import Path

from releasing import chroots, sources
from releasing.chroots import Chroot

TEMPLATES = sources.TOP / "tools" / "debian"
SUITE = "trixie"
_MAINTAINER = "pkramfs maintainers <maintainers@pkramfs.invalid>"
_BUILD = """\
cd "$1"
umask "$2"
export SOURCE_DATE_EPOCH=$3 TZ=$4
dpkg-buildpackage -us -uc
"""


def version() -> str:
    """Return the upstream version, of which each must name one source only."""
    day = time.strftime("%Y%m%d", time.gmtime(sources.epoch()))
    return sources.version() if sources.is_released() else f"{sources.version()}+{day}"


def unpack(distribution: Path, place: Path) -> Path:
    """Lay out the source package in `place`; return its tree, with debian/ in it."""
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(distribution, place / f"pkramfs_{version()}.orig.tar.gz")
    with tarfile.open(distribution) as archive:
        sources.unpack(archive, place)
    (tree,) = (path for path in place.iterdir() if path.is_dir())
    tree = tree.rename(place / f"pkramfs-{version()}")
    shutil.copytree(TEMPLATES, tree / "debian")
    name, address = os.environ.get("DEBFULLNAME"), os.environ.get("DEBEMAIL")
    words = {
        "VERSION": version(),
        "DISTRIBUTION": "unstable" if sources.is_released() else "UNRELEASED",
        "MAINTAINER": f"{name} <{address}>" if name and address else _MAINTAINER,
        "DATE": formatdate(sources.epoch()),
    }
    for file in ("control", "changelog"):
        text = (tree / "debian" / file).read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(f"@{word}@", value)
        (tree / "debian" / file).write_text(text, encoding="utf-8")
    return tree


def build(distribution: Path, out: Path, builder: Chroot, *, where: str = "build", mask: str = "022") -> list[Path]:
    """Build the source package and the .deb in a chroot; return the files that are the result."""
    tree = unpack(distribution, builder.root / where)
    inside = f"/{tree.relative_to(builder.root)}"
    zone = "UTC" if where == "build" else "Asia/Kathmandu"
    builder.run(_BUILD, inside, mask, str(sources.epoch()), zone)
    out.mkdir(parents=True, exist_ok=True)
    made = [path for path in sorted(tree.parent.iterdir()) if path.suffix in (".gz", ".xz", ".dsc", ".deb")]
    return [Path(shutil.copy(path, out)) for path in made]


def chroot(cache: Path, suite: str, place: Path) -> Chroot:
    """Return a new chroot to build in."""
    return chroots.builder(cache, suite, TEMPLATES / "control").copy(place)
