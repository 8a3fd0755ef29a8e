# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram-kexec understands kexec(8)'s spelling, and refuses what cannot be meant in one line."""

import pytest

from pkramfs.cli import kexec
from pkramfs.errors import UsageError


def parse(text: str):
    args = kexec.parser().parse_args(text.split())
    kexec.check(args)
    return args


@pytest.mark.parametrize(
    "text",
    [
        "-l builtin",
        "--load builtin",
        "builtin -l",
        "-s -l builtin --initrd=/initrd --append=quiet",
        "-sl builtin --ramdisk /initrd --command-line quiet",
        "-l --kexec-file-syscall builtin",
        "-a -l builtin --reuse-cmdline -x -y -t bzImage",
    ],
)
def test_load_in_all_its_spellings(text):
    args = parse(text)
    assert (args.load, args.exec, args.image) == (True, False, "builtin")


def test_the_announcement_s_command_line():
    words = ["-s", "-l", "/boot/vmlinuz-6.1", "--initrd=/boot/initrd.img-6.1", "--append=root=/dev/sda1 ro pkram=34f"]
    args = kexec.parser().parse_args(words)
    kexec.check(args)
    assert args.syscall == "file"
    assert args.initrd == "/boot/initrd.img-6.1"
    assert args.append == "root=/dev/sda1 ro pkram=34f"


def test_load_and_execute_in_one_word():
    args = parse("-le builtin:64M --reuse-cmdline")
    assert (args.load, args.exec, args.image, args.reuse_cmdline) == (True, True, "builtin:64M", True)


def test_unload_of_the_crash_kernel_needs_no_image():
    args = parse("-u -p")
    assert args.unload and args.load_panic


def test_addresses_and_segments():
    args = parse("-c -l builtin --mem-min 0x1000000 --mem-max 2G --segment /a@b@0x2000 --segment /c@16M")
    assert (args.syscall, args.mem_min, args.mem_max) == ("load", 0x1000000, 2 << 30)
    assert args.segment == [("/a@b", 0x2000), ("/c", 16 << 20)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing to do"),
        ("builtin", "nothing to do"),
        ("--force", "nothing to do"),
        ("-l", "no IMAGE given"),
        ("-e builtin", "no action given for builtin: -l loads it"),
        ("-l -p builtin", "give one of them"),
        ("-e --panic", "give one of them"),
        ("--status -e", "--status excludes the other actions"),
        ("-s -l builtin --segment /a@16M", "use -c"),
        ("-l builtin --mem-min 2G --mem-max 2G", "--mem-min is not below --mem-max"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)


@pytest.mark.parametrize(("text", "status"), [("-e", 8), ("-e -n", 8), ("-u", 0), ("--resume", 0)])
def test_where_there_is_no_machine_none_is_made(text, status, pkram_root):
    assert kexec.main(text.split()) == status
    assert list(pkram_root.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["-s -c -l builtin", "--segment nowhere -l builtin", "--segment /a@much -l builtin", "--mem-min x -e"]
)
def test_malformed_options_are_one_line_and_status_2(text, capsys):
    assert kexec.main(text.split()) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("pkram-kexec: ")
    assert shown.count("\n") == 1
