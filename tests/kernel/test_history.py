# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernels before were: noted as they end, bounded, and in nobody's way."""

import json

import pytest

from pkramfs.errors import MachineError
from pkramfs.kernel import history, memorymap
from pkramfs.kernel.memorymap import DESTINATION, FREE, HOLE, LEASED, PRESERVED
from pkramfs.machine.directory import Machine
from pkramfs.spans import Spans
from tests.support.lab import Boots


def test_each_kernel_is_noted_once_as_it_ends(lab: Boots):
    lab.preserve("a", 10)
    lab.cycle()
    lab.cycle("builtin:2M")
    found = history.read(lab.machine)["kernels"]
    assert [(one["generation"], one["kind"], one["image"], one["by"]) for one in found] == [
        (1, "cold", "builtin", "kexec"),
        (2, "kexec", "builtin:4M", "kexec"),
    ]
    assert all(one["booted"] <= one["ended"] for one in found)
    assert found[0]["ended"] <= found[1]["booted"]
    assert [node["name"] for node in found[1]["nodes"]] == ["a"]
    now = history.current(lab.machine)
    assert now is not None and (now["generation"], now["ended"], now["by"]) == (3, None, None)


def test_a_kernel_that_ends_in_two_attempts_is_noted_once(lab: Boots):
    lab.load()
    with lab.dies("find"):
        lab.execute()
    lab.up()
    assert [one["generation"] for one in history.read(lab.machine)["kernels"]] == [1]


def test_who_had_which_pages_is_noted(lab: Boots):
    lab.preserve("a", 700)
    frames, _, _ = lab.grow(100)
    claim = lab.machine.claim(frames.tree_id)
    claim.write_entry({"mountpoint": "/mnt", "pid": 0})
    lab.load()
    kernel = lab.up()
    then = memorymap.parts(kernel, {frames.tree_id: "/mnt"})
    lab.execute(force=True)
    before = history.read(lab.machine)["before"]
    assert before["generation"] == 1
    found = memorymap.remembered(lab.machine, before)
    assert {(part.kind, part.owner): part.pages for part in found} == {
        (part.kind, part.owner): part.pages for part in then
    }
    assert {part.kind for part in found} >= {HOLE, FREE, LEASED, PRESERVED, DESTINATION}
    claim.release()


def test_few_ranges_stand_for_many():
    many = Spans((at * 10, at * 10 + 3) for at in range(1000))
    noted = memorymap.to_json(memorymap.Part(PRESERVED, "a", many), 64)
    assert noted["pages"] == 3000 and len(noted["ranges"]) <= 64
    assert not many - Spans(map(tuple, noted["ranges"]))
    assert noted["ranges"][0][0] == 0 and noted["ranges"][-1][1] == 9993


@pytest.mark.parametrize("text", ["", "{", '{"kernels": 7}', '{"before": {"generation": 1}}', "[]"])
def test_a_damaged_file_is_in_nobodys_way(lab: Boots, text: str):
    lab.preserve("a", 10)
    lab.load()
    lab.machine.write_text(history.NAME, text)
    with pytest.raises(MachineError, match=r"history\.json is damaged.*remove it: it is only shown"):
        history.read(lab.machine)
    lab.execute()
    assert lab.intact("a")
    assert [one["generation"] for one in history.read(lab.machine)["kernels"]] == [1]  # begun anew


def test_a_file_that_cannot_be_written_stops_no_kexec(lab: Boots, monkeypatch: pytest.MonkeyPatch):
    lab.preserve("a", 10)
    lab.load()
    write = Machine.write_json

    def full(self: Machine, name: str, data: dict[str, object]) -> None:
        if name == history.NAME:
            raise MachineError("no space left")
        write(self, name, data)

    monkeypatch.setattr(Machine, "write_json", full)
    said: list[str] = []
    monkeypatch.setattr(Machine, "log", lambda _, message, **__: said.append(message))
    assert lab.execute().generation == 2 and lab.intact("a")
    assert [line for line in said if line.startswith("history: ")] == [
        "history: who has which pages is not noted: no space left",
        "history: kernel is not noted: no space left",
    ]


def test_the_file_stays_small(lab: Boots):
    for number in range(1, 100):
        kernel = {
            "generation": number,
            "kind": "cold",
            "image": "x",
            "booted": 1,
            "ended": 2,
            "by": None,
            "pause": None,
        }
        found = history.read(lab.machine)["kernels"]
        lab.up()
        data = {"kernels": [*found, kernel | {"nodes": [], "lost": [], "events": []}]}
        lab.machine.write_json(history.NAME, data)
    lab.cycle()
    found = history.read(lab.machine)["kernels"]
    assert len(found) == history.MOST_KERNELS and found[-1]["generation"] == 1


LOG = """\
[    0.000000] clocksource: boot clock 1795958466.225616
[    0.001021] Command line: pkramfs: x mounted on /
[    0.337515] pkramfs: one mounted on /mnt (restored 1 file, 300 MiB)
[    3.513093] pkramfs: one preserved: 1 file, 300 MiB, 10.3 ms
[    5.000000] pkramfs: daemon of tree 00000000000abcde (pid 7, /mnt) has died
[    5.000001] pkramfs: daemon of tree 00000000000abcde: Fatal Python error: Aborted
[    5.000002] pkramfs: daemon of tree 00000000000abcde: Current thread 0x0000
[    5.100000] pkramfs: the daemon of one was killed by signal 9, another takes over
[    5.200000] pkramfs: one mounted on /mnt again by daemon 77
[    5.300000] pkramfs: daemon 77 of one makes room for another
[    5.400000] pkramfs: the daemon of one was killed by signal 9, and none takes over: mount it again
[    5.500000] pkramfs: the code on disk has failed under one (its daemon ended with status 3): the code before goes on
[    5.600000] pkramfs: the code on disk has failed under one (its holder ended): the code before goes on
[    6.000000] kexec: refused: /mnt: 1 file would be lost
[    7.000000] pkram: shmem-one is lost (10 pages): given up by a forced kexec
nonsense
"""


def test_what_a_log_tells():
    found = history.events(LOG)
    assert [(one["at"], one["kind"]) for one in found] == [
        (0.337515, "runs"),
        (3.513093, "runs"),
        (5.0, "died"),
        (5.000001, "died"),
        (5.1, "died"),
        (5.2, "taken"),
        (5.3, "runs"),
        (5.4, "died"),
        (5.5, "died"),
        (5.6, "died"),
        (6.0, "refused"),
        (7.0, "lost"),
    ]
    assert history.deaths(LOG) == 4
    assert len(history.events(LOG * 99)) == history.MOST_EVENTS
    long = json.dumps(history.events(f"[ 1.0] pkramfs: {'x' * 9999} mounted on /\n"))
    assert len(long) < 300
