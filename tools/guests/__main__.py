# SPDX-License-Identifier: GPL-2.0-or-later
"""Boot a guest, kexec in it for real, and say PASS or FAIL.

    --backend devdax|fsdax|devmem   where the machine's memory is
    --backend both                  two machines at once, on devdax and on fsdax, with a tree each
    --kernel SUITE, --to SUITE      from which Debian suite the two kernels come; they take turns
    --kexecs N                      how many kexecs; odd ones by pkram-kexec, even ones by kexec(8) alone
    --control NAME                  something goes wrong on purpose, and must be refused: nopkram, nomemmap, metadata,
                                    data, firmware, crash; with two machines, for one of them alone: two-nopkram,
                                    two-stale, two-nomemmap
    --systemd                       with /etc/fstab, the unit of `pkramctl install`, and `systemctl kexec`
    --controls                      all of them that the backend has, one after another

All that is fetched stays in --cache. QEMU emulates in software: /dev/kvm may be there and boot no kernel.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

from guests import image
from guests.packages import SYSTEMD, Archive, UnavailableError, missing

MEMORY_MIB, SIZE_MIB, AT_MIB = 1536, 512, 512
CANNOT = 77
CONTROLS = ("nopkram", "nomemmap", "metadata", "data", "firmware", "crash")
CONTROLS_OF_TWO = ("two-nopkram", "two-stale", "two-nomemmap")
GAP_MIB = 64
"""Between the memory of two machines: ranges that touch would be one."""
_QUIET = "console=ttyS0 panic=-1 no_timer_check nowatchdog loglevel=4"
_SYSTEMD = "pk.systemd=1 systemd.show_status=no systemd.log_target=console systemd.log_level=warning"
_DEATHS = ("Kernel panic", "Oops:", "BUG:", "Freezing execution")
_WANTED_DEATH = "sysrq triggered crash"
_CRASH_MIB = 256


def main() -> int:
    args = parse()
    if lacking := missing():
        print(f"real-kexec: cannot run here: {', '.join(lacking)} is missing", file=sys.stderr)
        return CANNOT
    began = time.monotonic()
    cache = Path(args.cache).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="real-kexec-"))
    try:
        try:
            userland = Archive(cache, args.userland).userland(*(SYSTEMD if args.systemd else ()))
            suites = (args.kernel, args.to or args.kernel)
            first, second = (Archive(cache, suite).kernel(args.package) for suite in suites)
        except UnavailableError as error:
            print(f"real-kexec: cannot run here: {error}", file=sys.stderr)
            return CANNOT
        both = {kernel.version: kernel for kernel in (first, second)}
        kernels = {version: (kernel, image.initrd(kernel, userland, work)) for version, kernel in both.items()}
        made = image.disk(userland, list(kernels.values()), work)
        say(began, f"{args.backend}, Linux {first.version} and {second.version}, {args.userland}: images are ready")
        results = []
        for control in args.wanted:
            words = f"pk.from={first.version} pk.to={second.version} pk.kexecs={args.kexecs}"
            words += f" pk.control={control}" if control else ""
            words += f" {_SYSTEMD}" if args.systemd else ""
            passed = boot(args, kernels[first.version], made, words, began, work)
            results.append(passed)
            say(began, f"{control or 'the walk'}: {'PASS' if passed else 'FAIL'}")
        print("PASS" if all(results) else "FAIL")
        return 0 if all(results) else 1
    finally:
        if args.keep:
            print(f"real-kexec: kept {work}", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)


def parse() -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="real-kexec", description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "where the machine's memory is (default: devdax)"
    parser.add_argument("--backend", choices=("devdax", "fsdax", "devmem", "both"), default="devdax", help=text)
    text = "the Debian suite of the first kernel (default: trixie)"
    parser.add_argument("--kernel", default="trixie", metavar="SUITE", help=text)
    parser.add_argument("--to", metavar="SUITE", help="the suite of the second kernel (default: as --kernel)")
    parser.add_argument("--userland", default="trixie", metavar="SUITE", help="the suite of the programs")
    parser.add_argument("--package", default="linux-image-cloud-amd64", help="the package of the kernels")
    parser.add_argument("--kexecs", type=int, default=2, help="how many kexecs (default: 2)")
    parser.add_argument("--systemd", action="store_true", help="with units and `systemctl kexec`, unattended")
    parser.add_argument("--control", choices=CONTROLS + CONTROLS_OF_TWO, help="one fault on purpose, see below")
    parser.add_argument("--controls", action="store_true", help="all faults, one after the other")
    parser.add_argument("--keep", action="store_true", help="keep images and logs")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for each guest")
    cache = os.path.expanduser("~/.cache/pkramfs-guests")
    parser.add_argument("--cache", default=cache, metavar="DIR", help="where fetched packages stay")
    args = parser.parse_args()
    controls = CONTROLS_OF_TWO if args.backend == "both" else CONTROLS
    if args.control and args.control not in controls:
        parser.error(f"with --backend {args.backend} the controls are {', '.join(controls)}")
    args.wanted = controls if args.controls else (args.control or "",)
    return args


def memmap(backend: str) -> str:
    """Return the words that set memory aside."""
    if backend == "both":
        half = SIZE_MIB // 2
        return f"memmap={half}M!{AT_MIB}M memmap={half}M!{AT_MIB + half + GAP_MIB}M"
    return f"memmap={SIZE_MIB}M{'$' if backend == 'devmem' else '!'}{AT_MIB}M"


def say(began: float, *words: object) -> None:
    print(f"{time.monotonic() - began:8.2f}", *words, file=sys.stderr, flush=True)


def boot(
    args: argparse.Namespace,
    first: "tuple[object, Path]",
    disk: Path,
    words: str,
    began: float,
    work: Path,
) -> bool:
    """Run one guest to its end, and return True if it passed."""
    kernel, ramdisk = first
    crash = "pk.control=crash" in words.split()
    words += f" crashkernel={_CRASH_MIB}M" * crash
    line = f"{_QUIET} {memmap(args.backend)} pk.stage=0 pk.backend={args.backend} {words}"
    command = [
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max,-cx16", "-smp", "1"),
        *("-m", f"{MEMORY_MIB}M", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
        *("-drive", f"file={disk},format=raw,if=none,id=d0,snapshot=on", "-device", "virtio-blk-pci,drive=d0"),
        *("-kernel", str(kernel.image), "-initrd", str(ramdisk), "-append", line),  # type: ignore[attr-defined]
        *([] if crash or "firmware" in words else ["-no-reboot"]),
    ]
    with (
        open(work / "log", "ab", buffering=0) as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as guest,
    ):
        assert guest.stdout is not None
        timer = threading.Timer(args.timeout, guest.kill)
        timer.start()
        try:
            return _passed(guest.stdout, log, began)
        finally:
            timer.cancel()
            guest.kill()


def _passed(output: IO[bytes], log: IO[bytes], began: float) -> bool:
    """Show what the guest says; return True if it passed and no kernel died."""
    passed = died = False
    for raw in output:
        line = raw.decode("utf-8", "replace").rstrip()
        log.write(f"{time.monotonic() - began:8.2f} {line}\n".encode())
        died = died or (any(word in line for word in _DEATHS) and _WANTED_DEATH not in line)
        if line.startswith("PK ") or any(word in line for word in (*_DEATHS, "Traceback", "Error")):
            say(began, line.removeprefix("PK "))
        if line.startswith("PK RESULT"):
            passed = line.endswith("PASS")
        if "Freezing execution" in line:  # by systemd, for ever
            break
    return passed and not died


if __name__ == "__main__":
    sys.exit(main())
