# SPDX-License-Identifier: GPL-2.0-or-later
"""The build backend: setuptools', after the manual pages were rendered to roff.

    pkramfs/resources/man/NAME.SECTION.md ──myst, docutils──▶ build/man/NAME.SECTION ──▶ share/man/manSECTION

The pages of a wheel are installed below the prefix that the commands are in, where man(1) looks by itself. An
editable install gets them, too. A source distribution carries this file, the tools and the tests.

The same source gives the same bytes, whoever builds it, when and where: all times are SOURCE_DATE_EPOCH's, no user and
no umask shows (reproducible-builds.org).
"""

import gzip
import os
import re
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # the hooks that need no change

TOP = Path(__file__).parents[1]
SOURCES, PAGES = TOP / "pkramfs" / "resources" / "man", TOP / "build" / "man"
_MANIFEST = """\
graft tools
graft tests
include CHANGELOG.md CONTRIBUTING.md
prune .ci
exclude .gitignore
global-exclude *.py[cod]
"""
_SETTINGS = {
    "myst_enable_extensions": ["deflist", "fieldlist"],
    "input_encoding": "unicode",
    "output_encoding": "unicode",
    "doctitle_xform": False,
    "report_level": 2,
    "halt_level": 2,  # a page with a slip is not built
    "_disable_config": True,
}
_CODE = re.compile(r"\S*[\w)\]][_/(=:.][\w(]\S*")  # a path, a name of Python's, an option with its value
_JOINT = re.compile(r"(?<=[\w)\]])([_/(=.]|::)(?=\w)")
_WHOLE = r"\%"  # at the beginning of a word: it is not hyphenated; inside of one it means the contrary


def render(source: Path) -> str:
    """Return a manual page as roff. Its name and section are the file's: `mount.pkramfs.8.md`."""
    from docutils.core import publish_string
    from docutils.writers import manpage
    from myst_parser.docutils_ import Parser

    name, section = source.stem.rsplit(".", 1)
    summary, text = _parts(source.read_text(encoding="utf-8"), name, section)

    class Page(manpage.Translator):
        """Docutils' translator, told what the head of the page says."""

        def __init__(self, document: Any) -> None:
            super().__init__(document)
            self._verbatim = False
            self._docinfo |= {
                "title": name,
                "title_upper": name,
                "subtitle": summary,
                "manual_section": section,
                "manual_group": "pkramfs",
                "version": f"pkramfs {_version()}",
                "date": _date(),
            }

        def visit_literal_block(self, node: Any) -> None:
            super().visit_literal_block(node)
            self._verbatim = True

        def depart_literal_block(self, node: Any) -> None:
            super().depart_literal_block(node)
            self._verbatim = False

        def visit_Text(self, node: Any) -> None:
            """Let no name of a program be hyphenated: it may be broken at its joints, and nothing is added there."""
            for at in range(len(self.body) - 2, len(self.body)):  # text, and perhaps what makes the next text bold
                self.body[at] = re.sub(r"(?<=\s)\($", r"\%(", self.body[at])
            inside = not "".join(self.body[-2:]).removesuffix(self.defs["literal"][0])[-1:].isspace()
            super().visit_Text(node)
            if not self._verbatim:
                text = _CODE.sub(_unhyphenated, self.body[-1])
                self.body[-1] = text.removeprefix(_WHOLE) if inside else text

    writer = manpage.Writer()
    writer.translator_class = Page
    page = publish_string(text, str(source), parser=Parser(), writer=writer, settings_overrides=_SETTINGS)
    return str(page).replace(".SH Name\n", ".ad l\n.SH NAME\n", 1)  # narrow columns cannot be justified


def _unhyphenated(word: re.Match[str]) -> str:
    return _WHOLE + _JOINT.sub(r"\1\:", word[0])


def _parts(text: str, name: str, section: str) -> tuple[str, str]:
    """Cut a page into its summary, from which the NAME section is made, and the sections that follow."""
    start = f"# {name}({section})\n\n## NAME\n\n{name} - "
    if not text.startswith(start):
        raise ValueError(f"{name}.{section}.md does not begin with its title and NAME section: {start!r}")
    summary, _, rest = text.removeprefix(start).partition("\n\n")
    return " ".join(summary.split()), re.sub("^##", "#", rest, flags=re.MULTILINE)


def _seconds() -> int:
    """Return the time of the source, in seconds since the epoch."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    return int(seconds) if seconds else max(int(page.stat().st_mtime) for page in SOURCES.glob("*.md"))


def _date() -> str:
    """Return the day of the source."""
    return time.strftime("%Y-%m-%d", time.gmtime(_seconds()))


def _version() -> str:
    """Return the version, which is read, not imported: the package's requirements may not be installed."""
    text = (TOP / "pkramfs" / "__init__.py").read_text(encoding="utf-8")
    return text.rpartition('__version__ = "')[2].partition('"')[0]


def render_all() -> None:
    """Render every page into build/man."""
    PAGES.mkdir(parents=True, exist_ok=True)
    for source in sorted(SOURCES.glob("*.md")):
        (PAGES / source.stem).write_text(render(source), encoding="utf-8")


def build_wheel(*args: Any, **words: Any) -> str:
    shutil.rmtree(TOP / "build" / "lib", ignore_errors=True)  # it keeps modules that are gone
    before = os.umask(0o022)  # modes are part of the wheel
    try:
        render_all()
        return str(build_meta.build_wheel(*args, **words))
    finally:
        os.umask(before)


def build_editable(*args: Any, **words: Any) -> str:
    render_all()
    return build_meta.build_editable(*args, **words)


def build_sdist(directory: str, *args: Any, **words: Any) -> str:
    """Build a source distribution with all that building and testing takes."""
    render_all()
    manifest = TOP / "MANIFEST.in"
    manifest.write_text(_MANIFEST)
    try:
        name: str = build_meta.build_sdist(directory, *args, **words)
    finally:
        manifest.unlink()
    _settle(Path(directory) / name)
    return name


def _settle(archive: Path) -> None:
    """Pack an archive again in the order of names, without what tells who packed it, and when."""
    packed = archive.with_suffix(".new")
    with (
        tarfile.open(archive) as old,
        open(packed, "wb") as file,
        gzip.GzipFile("", "wb", 9, file, mtime=_seconds()) as squeezed,
        tarfile.open(fileobj=squeezed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old, key=lambda member: member.name):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime, member.pax_headers = _seconds(), {}  # else the fractions of seconds stay
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    packed.replace(archive)
