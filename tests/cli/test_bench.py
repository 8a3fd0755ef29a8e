# SPDX-License-Identifier: GPL-2.0-or-later
"""tools/bench: what it says of a figure, what it writes, and a short run of the sections below FUSE."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    from benchmarks.table import Table

    return Table(runs=3, quick=True)


def bench(*words):
    """The command behind tools/bench, which sets up what is missing first."""
    paths = os.pathsep.join([str(TOOLS.parent), str(TOOLS)])
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, words)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("values", "unit", "reference", "floor", "target", "met"),
    [
        ([4, 9, 5], "ms", None, None, "<5 ms", True),
        ([4, 9, 5.1], "ms", None, None, "<5 ms", False),
        ([13], "ms", [10], None, "<1.3x", True),
        ([14], "ms", [10], None, "<1.3x", False),
        ([14], "ms", [10], [12], "<1.3x or 1.2x of the floor", True),
        ([15], "ms", [10], [12], "<1.3x or 1.2x of the floor", False),
        ([15], "ms", [10], None, "<1.3x or 1.2x of the floor", False),
        ([80], "/s", [100], None, ">0.8x", True),
        ([79], "/s", [100], None, ">0.8x", False),
        ([84], "MiB/s", [1000], [100], ">0.8x or 1.2x of the floor", True),
        ([83], "MiB/s", [1000], [100], ">0.8x or 1.2x of the floor", False),
        ([1], "ms", [1], None, "", None),
    ],
)
def test_a_target_is_met_by_the_median(table, values, unit, reference, floor, target, met):
    table.add("s", "name", values, unit, reference=reference, floor=floor, target=target)
    assert table.figures[0].met is met
    verdict = {None: "0 of 0 targets met", True: "1 of 1 targets met", False: "0 of 1 targets met; missed: s: name"}
    assert table.verdict() == verdict[met]


def test_a_short_run_and_its_json(tmp_path):
    """100 GiB are 4 here: it is about the rows, not about the time they take."""
    done = bench("--quick", "--runs", 2, "--json", tmp_path / "figures", "rfc")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures").read_text())
    assert len(figures) == 16 and f"of {len([f for f in figures if f['target']])} targets met" in done.stdout
    for figure in figures:
        assert {"section", "name", "value", "unit", "reference", "ratio", "target", "met"} <= set(figure)
        assert figure["section"] == "rfc" and 0 < figure["low"] <= figure["value"] <= figure["high"]
        if figure["reference"]:
            assert figure["ratio"] == pytest.approx(figure["value"] / figure["reference"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "no section nothing: there are rfc,"),
        (["--runs", "0", "rfc"], "--runs 0: at least one run is needed"),
        (["--json", "/proc/absent/figures", "rfc"], "--json /proc/absent/figures: No such file or directory"),
    ],
)
def test_bad_words_are_one_line(words, said):
    done = bench(*words)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
