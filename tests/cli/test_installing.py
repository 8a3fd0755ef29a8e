# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl install and boot: what belongs in place gets there and goes again, and nothing of anybody else's."""

import argparse
import json
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from pkramfs.cli import checkup, completions, ctl, installing, kexec, mount
from pkramfs.errors import explain

PROGRAMS = {"pkramctl": ctl.parser, "pkram-kexec": kexec.parser, "mount.pkramfs": mount.parser}


def files(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir() or path.is_symlink()}


def test_all_is_put_in_place_once_and_removed(root, ctl, tmp_path):
    top = tmp_path / "usr"
    status, out, err = ctl("install", "--prefix", str(top))
    assert (status, err) == (0, "")
    there = files(top)
    assert {f"sbin/{name}" for name in checkup.HELPERS} <= there
    for program in PROGRAMS:
        assert {place.format(program) for place, _ in completions.SHELLS.values()} <= there
    assert os.readlink(top / "sbin/mount.pkramfs") == checkup.own_helper()
    assert out.count("wrote ") == len(there)
    assert ctl("install", "--prefix", str(top))[1] == f"0 files written, {len(there)} in place already\n"
    assert [one.level for one in checkup.helpers(checkup.Host(str(top), uid=0))] == ["ok", "ok"]
    found = json.loads(ctl("--json", "install", "--prefix", str(top), "--uninstall")[1])
    assert len(found["removed"]) == len(there) and files(top) == set()
    assert ctl("install", "--prefix", str(top), "--uninstall")[1].startswith("0 files removed")


def test_what_is_not_ours_stays(root, ctl, tmp_path):
    helper = tmp_path / "sbin/mount.pkramfs"
    page = tmp_path / "share/zsh/site-functions/_pkramctl"
    for path in (helper, page):
        path.parent.mkdir(parents=True)
        path.write_text("somebody else's\n")
    status, _, err = ctl("install", "--prefix", str(tmp_path))
    assert status == 8
    assert err == f"pkramctl: {helper} exists and is not ours: move it away, or --force replaces it\n"
    assert files(tmp_path) == {"sbin/mount.pkramfs", "share/zsh/site-functions/_pkramctl"}  # nothing half done
    assert ctl("install", "--prefix", str(tmp_path), "--uninstall")[0] == 0
    assert page.read_text() == helper.read_text() == "somebody else's\n"
    assert ctl("install", "--prefix", str(tmp_path), "--force")[0] == 0
    assert helper.is_symlink() and "#compdef" in page.read_text()


def test_an_earlier_one_of_ours_is_replaced(root, ctl, tmp_path):
    helper = tmp_path / "sbin/mount.pkramfs"
    helper.parent.mkdir()
    helper.symlink_to("/opt/old/bin/mount.pkramfs")
    assert ctl("install", "--prefix", str(tmp_path))[0] == 0
    assert os.readlink(helper) == checkup.own_helper()


def test_a_link_to_a_link_is_in_place(root, ctl, tmp_path):
    """As Debian has them: where /sbin is /usr/sbin, a link by another way would lead to itself."""
    between = tmp_path / "bin" / "mount.pkramfs"
    for path, target in ((between, checkup.own_helper()), (tmp_path / "sbin/mount.pkramfs", "../bin/mount.pkramfs")):
        path.parent.mkdir()
        path.symlink_to(target)
    assert ctl("install", "--prefix", str(tmp_path))[0] == 0
    assert os.readlink(tmp_path / "sbin/mount.pkramfs") == "../bin/mount.pkramfs"


def test_a_helper_that_is_in_its_place_itself_stays(root, ctl, tmp_path, monkeypatch):
    helper = tmp_path / "sbin/mount.pkramfs"
    helper.parent.mkdir()
    helper.write_text("#!/bin/sh\n")
    monkeypatch.setattr(checkup, "own_helper", lambda: str(helper))
    for words in ((), ("--uninstall",)):
        assert ctl("install", "--prefix", str(tmp_path), *words)[0] == 0
        assert helper.read_text() == "#!/bin/sh\n" and not helper.is_symlink()


@pytest.mark.parametrize("words", [(), ("--uninstall",)])
def test_what_a_distribution_installed_is_its_own(root, ctl, words, monkeypatch):
    monkeypatch.setattr(metadata.PathDistribution, "read_text", lambda self, name: "debian\n")
    status, out, err = ctl("install", *words)
    assert (status, out) == (8, "")
    assert err == "pkramctl: Debian's package installs and removes these files: --prefix DIR makes another copy\n"


def test_a_place_that_cannot_be_written(root, ctl, tmp_path):
    (tmp_path / "sbin").write_text("")
    status, out, err = ctl("install", "--prefix", str(tmp_path))
    assert (status, out, err.count("\n")) == (8, "", 1) and err.startswith(f"pkramctl: cannot write {tmp_path}/sbin")


def test_the_link_is_named_that_cannot_be_made():
    with pytest.raises(OSError) as error:
        os.symlink("/where/it/leads", "/proc/self/link")
    assert explain(error.value).startswith("/proc/self/link: ")


def test_units_go_below_etc(root, ctl, tmp_path, monkeypatch):
    resources = tmp_path / "resources"
    (resources / "systemd").mkdir(parents=True)
    for name in ("a@.service", "70-a.rules", "README"):
        (resources / "systemd" / name).write_text("x\n")
    monkeypatch.setattr(installing, "_RESOURCES", str(resources))
    etc = tmp_path / "etc"
    assert ctl("install", "--etc", str(etc))[0] == 0
    assert files(etc) == {"systemd/system/a@.service", "udev/rules.d/70-a.rules"}
    (etc / "systemd/system/a@.service").write_text("changed by the administrator\n")
    status, _, err = ctl("install", "--etc", str(etc))
    assert status == 8 and "a@.service exists and is not ours" in err


def every_option(parser: argparse.ArgumentParser) -> set[str]:
    found = {one for action in parser._actions if action.help != argparse.SUPPRESS for one in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set(action.choices).union(*map(every_option, action.choices.values()))
    return found


@pytest.mark.parametrize("shell", completions.SHELLS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_completed_in_a_script_that_its_shell_reads(shell, program, tmp_path):
    parser = PROGRAMS[program]()
    text = completions.SHELLS[shell][1](program, parser)
    assert {one for one in every_option(parser) if one.lstrip("-") not in text} == set()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is missing: apt-get install {shell}")
    script = tmp_path / "script"
    script.write_text(text)
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def in_bash(directory: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words of a command line."""
    (directory / "script").write_text(completions.bash(words[0], PROGRAMS[words[0]]()))
    code = 'source ./script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); "_${1//[^[:alnum:]]/_}"; '
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    command = ["bash", "--norc", "-c", code, "bash", *words]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")) - {""}


def test_bash_offers_what_may_follow(tmp_path):
    assert in_bash(tmp_path, "pkramctl", "mach") == {"machine"}
    assert in_bash(tmp_path, "pkramctl", "machine", "") == {"create", "show", "destroy"} | {
        one for one in in_bash(tmp_path, "pkramctl", "machine", "-")
    }
    assert "--seed" in in_bash(tmp_path, "pkramctl", "--json", "machine", "create", "--s")
    assert in_bash(tmp_path, "pkramctl", "machine", "create", "--map", "") == {"script"}  # a file
    assert in_bash(tmp_path, "pkramctl", "machine", "create", "--ram", "") == set()
    assert "superblock" in in_bash(tmp_path, "pkramctl", "inspect", "super")
    assert "script" in in_bash(tmp_path, "pkram-kexec", "-l", "")  # the image
    assert in_bash(tmp_path, "pkram-kexec", "--app") == {"--append"}


def test_fish_offers_what_may_follow(tmp_path):
    if shutil.which("fish") is None:
        pytest.skip("fish is missing: apt-get install fish")
    script = tmp_path / "script.fish"
    script.write_text(completions.fish("pkramctl", ctl.parser()))
    code = f"source {script}; complete -C 'pkramctl mach'; complete -C 'pkramctl machine cr'"
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(["fish", "-N", "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["machine", "create"]


def test_boot_makes_boots_and_leaves_alone(root, ctl):
    status, out, err = ctl("boot")
    assert (status, err) == (0, "") and out.startswith("kernel 1 (builtin) is up, super block at pfn ")
    assert ctl("boot")[1].startswith("kernel 1 (builtin) runs already, ")
    assert json.loads(ctl("--json", "boot")[1])["booted"] is False
