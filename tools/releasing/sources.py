# SPDX-License-Identifier: GPL-2.0-or-later
"""A source distribution and a wheel, of nothing but what the checkout tracks.

    checkout ──copy──▶ clean tree ──build_sdist──▶ .tar.gz ──unpack, build_wheel──▶ .whl

The wheel is made of the source distribution, so that nothing can be missing in that one. Both come from the build
backend (building.py) in a process of its own; what it imports is in .venv, and nothing is fetched.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

TOP = Path(__file__).parents[2]
_PRODUCTS = {"build", "run", ".git", ".venv", "__pycache__", "PKG-INFO", "setup.cfg"}
_HOOK = "import building, sys; getattr(building, sys.argv[1])(sys.argv[2])"


class BuildError(Exception):
    """Something cannot be built here; the text says why."""


def epoch() -> int:
    """Return the time of the source: SOURCE_DATE_EPOCH, the last commit's, or that of an unpacked distribution."""
    if said := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(said)
    if (TOP / ".git").exists():
        return int(_git("log", "-1", "--format=%ct"))
    return int((TOP / "pyproject.toml").stat().st_mtime)


def version() -> str:
    """Return the version, without importing the package."""
    text = (TOP / "pkramfs" / "__init__.py").read_text(encoding="utf-8")
    return text.rpartition('__version__ = "')[2].partition('"')[0]


def is_released() -> bool:
    """Return True if the newest section of CHANGELOG is that of a release."""
    return "\n## Unreleased\n" not in (TOP / "CHANGELOG.md").read_text(encoding="utf-8")


def changed() -> list[str]:
    """Return the files that differ from the last commit."""
    return _git("status", "--porcelain").splitlines() if (TOP / ".git").exists() else []


def files() -> list[Path]:
    """Return the files of the source, below TOP: what is tracked, or all of an unpacked distribution."""
    if (TOP / ".git").exists():
        names = [Path(name) for name in _git("ls-files", "-z").split("\0") if name]
    else:
        names = [path.relative_to(TOP) for path in TOP.rglob("*") if path.is_file()]
    return sorted(name for name in names if (TOP / name).is_file() and not _is_product(name))


def _is_product(name: Path) -> bool:
    return bool(_PRODUCTS & set(name.parts)) or any(part.endswith(".egg-info") for part in name.parts)


def build(out: Path, work: Path, *, mask: int = 0o022, **environment: str) -> tuple[Path, Path]:
    """Build both into `out`, with `work` for what is between; return their paths."""
    for directory in (out, work):
        directory.mkdir(parents=True, exist_ok=True)
    copy = work / "copy"
    for name in files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / name, copy / name)
    source = _hook("build_sdist", copy, work / "sdist", mask, environment)
    with tarfile.open(source) as archive:
        unpack(archive, work / "unpacked")
    (unpacked,) = (work / "unpacked").iterdir()
    wheel = _hook("build_wheel", unpacked, work / "wheel", mask, environment)
    made = tuple(Path(shutil.copy(path, out)) for path in (source, wheel))
    return made[0], made[1]


def unpack(archive: tarfile.TarFile, place: Path) -> None:
    """Unpack an archive of ours; Debian 12's Python 3.11.2 has no filters."""
    archive.extractall(place, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def _hook(name: str, tree: Path, out: Path, mask: int, environment: dict[str, str]) -> Path:
    """Call a hook of the build backend in a tree, and return the file that it made."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-B", "-c", _HOOK, name, str(out)],
        cwd=tree,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch()), "PYTHONPATH": str(tree / "tools"), **environment},
        umask=mask,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BuildError(f"{name} failed in {tree}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    (made,) = out.iterdir()
    return made


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=TOP, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"git {words[0]} failed in {TOP}: {done.stderr.strip()}")
    return done.stdout
