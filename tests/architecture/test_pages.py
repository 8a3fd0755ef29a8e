# SPDX-License-Identifier: GPL-2.0-or-later
"""The manual pages as man(1) shows them: every page is rendered, and groff has nothing to warn of."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parents[2]
SOURCES = sorted((TOP / "pkramfs" / "resources" / "man").glob("*.md"))


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOP / "tools"))
    pytest.importorskip("myst_parser", reason="the build requirements are not installed")
    import building

    return building


def groff(page: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Format a page as man(1) does on a terminal of 80 columns."""
    command = ["groff", "-K", "utf8", "-T", "utf8", "-t", "-man", "-ww", "-rLL=78n", "-rLT=78n", *words]
    return subprocess.run(command, input=page, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_page_is_rendered_without_warnings(building: Any, source: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is missing: tools/setup --tests installs it")
    done = groff(building.render(source), "-P", "-c")
    assert (done.returncode, done.stderr) == (0, "")
    shown = re.sub(".\b", "", done.stdout)
    name, section = source.stem.rsplit(".", 1)
    assert shown.splitlines()[0].startswith(f"{name}({section})")
    headings = re.findall(r"^##* (.*)$", source.read_text(), re.MULTILINE)[1:]
    assert [heading for heading in headings if heading.replace("`", "") not in shown] == []
    assert re.findall(r"\S*\w[_/]\w*\u2010", shown) == []  # a hyphen that is not in the name


def test_a_warning_is_seen() -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is missing: tools/setup --tests installs it")
    assert "nosuch" in groff(".TH x 8\n.nosuch\n").stderr


@pytest.mark.parametrize("text", ["", "# other(8)\n\n## NAME\n\nx - y\n\n", "# x(8)\n\n## SYNOPSIS\n\n"])
def test_a_page_without_its_name_is_refused(building: Any, tmp_path: Path, text: str) -> None:
    source = tmp_path / "x.8.md"
    source.write_text(text)
    with pytest.raises(ValueError, match=r"x\.8\.md does not begin with its title"):
        building.render(source)


def test_the_same_source_gives_the_same_page(building: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    page = building.render(SOURCES[0])
    assert page == building.render(SOURCES[0]) and '"1970-01-02"' in page


def test_the_backend_needs_nothing_of_the_package(building: Any) -> None:
    """It runs where only the build requirements are installed, and finds the version all the same."""
    import pkramfs

    code = f"import sys; sys.modules['pkramfs'] = None; sys.path.insert(0, {str(TOP / 'tools')!r})\n"
    code += "import building; print(building._version())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout.strip() == pkramfs.__version__, done.stderr
