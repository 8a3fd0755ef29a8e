# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram=off: a kernel as if it were built without PKRAM. It restores nothing, preserves nothing, touches nothing."""

import errno
from typing import Any

import pytest

from pkramfs.errors import FormatError, NotPreservedError, PkramError, UsageError
from pkramfs.kernel import cmdline, kexec
from pkramfs.kernel.loading import Request, compose_cmdline
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import new_tree_id


def off(lab: Any) -> Any:
    return lab.cycle(append="ro pkram=off")


def test_the_word() -> None:
    assert cmdline.pkram_off("ro pkram=off")
    assert cmdline.pkram_pfn("ro pkram=off") is None
    assert not cmdline.pkram_off("ro pkram=34f")
    assert not cmdline.pkram_off("ro off")
    with pytest.raises(UsageError, match="leave the current one only"):
        cmdline.validate("pkram=34f pkram=off")
    with pytest.raises(UsageError, match="or off"):
        cmdline.validate("pkram=on")


def test_everything_answers_enodev(lab: Any) -> None:
    kernel = off(lab)
    assert not kernel.info.pkram
    frames = Frames(kernel.ram, kernel.leases, new_tree_id())
    for ask in (
        kernel.store.nodes,
        lambda: kernel.store.prepare_load(b"a"),
        lambda: kernel.store.prepare_save(b"a", tree_id=frames.tree_id, frames=frames),
        lambda: kernel.store.withdraw(b"a"),
        kernel.store.free,
    ):
        with pytest.raises(PkramError, match="switched off") as caught:
            ask()
        assert caught.value.errno == errno.ENODEV


def test_nothing_is_set_aside_and_frames_are_frames(lab: Any) -> None:
    kernel = off(lab)
    assert kernel.info.reserve_blocks == ()
    assert lab.machine.read_text("pkram") is None
    assert "pkram: disabled on the command line" in lab.machine.dmesg()
    frames, _, _ = lab.grow(1000)
    assert frames.used_pages == 1000
    assert kernel.sweep() > 0, "its owner has no lock and no node can name it"


def test_what_is_preserved_is_not_lost_by_a_word(lab: Any) -> None:
    lab.preserve("a", 100)
    lab.load(append="ro pkram=off")
    with pytest.raises(NotPreservedError, match=r"1 node \(a\), .* lost: the loaded command line says pkram=off"):
        lab.execute()
    assert lab.intact("a")
    kernel = lab.execute(force=True)
    assert not kernel.info.pkram
    assert kernel.info.report["lost"][0]["name"] == "node a"
    assert "pkram: node a is lost" in lab.machine.dmesg()


def test_boot_itself_refuses_to_lose_nodes(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.preserve("a", 100)
    lab.load(append="ro pkram=off")
    monkeypatch.setattr(kexec, "_names_current", lambda going: True)
    with pytest.raises(FormatError, match="the command line says pkram=off"):
        lab.execute()


def test_off_stays_off_until_somebody_says_otherwise(lab: Any) -> None:
    kernel = off(lab)
    reused = compose_cmdline(kernel, Request("builtin:4M", reuse_cmdline=True))
    assert reused == "ro pkram=off"
    kernel = lab.cycle(append=reused)
    assert not kernel.info.pkram
    lab.load(append="ro")
    plan = kexec.plan(lab.machine, [])
    assert not plan.problems
    assert "PKRAM is off" in "\n".join(plan.describe())
    kernel = lab.execute()
    assert kernel.info.pkram
    lab.preserve("b", 10)
    assert lab.intact("b")
