# SPDX-License-Identifier: GPL-2.0-or-later
"""The pictures as a browser draws them: every text is on the sheet, every colour of the legend is seen.

Needs Chromium, which nothing here installs (Debian: apt-get install chromium).
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pkramfs.cli import generations, mapsheet, ramview, timesheet
from pkramfs.cli.drawing import COLOURS
from tests.support.lab import Boots

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=10000"),
)
LOOK = """
const found = {};
for (const svg of document.querySelectorAll("svg")) {
  const [width, height] = [svg.width.baseVal.value, svg.height.baseVal.value];
  const off = [...svg.querySelectorAll("text")].filter(text => {
    const box = text.getBBox();
    return box.x < 0 || box.y < 0 || box.x + box.width > width || box.y + box.height > height;
  }).map(text => text.textContent);
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    const to = canvas.getContext("2d");
    to.drawImage(image, 0, 0);
    const data = to.getImageData(0, 0, width, height).data, colours = {};
    for (let at = 0; at < data.length; at += 4) {
      const name = "#" + [0, 1, 2].map(part => data[at + part].toString(16).padStart(2, "0")).join("");
      colours[name] = (colours[name] || 0) + 1;
    }
    found[svg.id] = {off, colours: Object.fromEntries(Object.entries(colours).filter(one => one[1] >= 20))};
    document.getElementById("found").textContent = JSON.stringify(found);
  };
  image.src = "data:image/svg+xml," + encodeURIComponent(new XMLSerializer().serializeToString(svg));
}
"""


def drawn(tmp_path: Path, pictures: dict[str, str]) -> dict[str, dict]:
    """Have a browser draw pictures: for each, the texts that are off the sheet, and the pixels of each colour."""
    page = "".join(svg.replace("<svg ", f'<svg id="{name}" ', 1) for name, svg in pictures.items())
    file = tmp_path / "page.html"
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8">{page}<pre id="found"></pre><script>{LOOK}</script>')
    words = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match and match[1], done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(match[1]))


@pytest.mark.skipif(BROWSER is None, reason="Chromium is missing: apt-get install chromium")
def test_a_browser_draws_all_of_it(machine, kexec, tmp_path):
    lab = Boots(machine)
    lab.preserve("one", 700)
    lab.preserve("w" * 120, 700, seed=2)
    assert kexec("-le", "builtin:4M", "--reuse-cmdline")[0] == 0
    lab.load("builtin:4M")
    frames, _, _ = lab.grow(600)
    claim = machine.claim(frames.tree_id)
    claim.write_entry({"mountpoint": "/mnt/" + "m" * 90, "pid": 1})
    view = ramview.View(machine)
    kernels = generations.gather(machine)
    sheets = {
        "map": mapsheet.draw(view, None),
        "pair": mapsheet.draw(view, ramview.Earlier(view)),
        "timeline": timesheet.draw("Kernels", kernels, kernels[-1]["booted"] + 9),
    }
    claim.release()
    for name, sheet in sheets.items():
        sheet.save(str(tmp_path / f"{name}.svg"))
    found = drawn(tmp_path, {name: (tmp_path / f"{name}.svg").read_text() for name in sheets})
    assert {name: one["off"] for name, one in found.items()} == {name: [] for name in sheets}
    kinds = {"free", "hole", "kernel", "reserve", "preserved", "leased", "destination"}
    for name, expected in {"map": kinds, "pair": kinds, "timeline": {"cold", "kexec"}}.items():
        assert {kind for kind in expected if COLOURS[kind] not in found[name]["colours"]} == set(), name
