# SPDX-License-Identifier: GPL-2.0-or-later
"""In the guest: the user at the keyboard, who types the announcement's steps and compares.

    pk.backend=devdax|fsdax|devmem   where the machine's memory is
    pk.stage=N                       how many kexecs there were; pk.kexecs=N are to be
    pk.to=VERSION                    the kernel to boot next
    pk.digest=…                      what the tree was: it travels on the command line, so that memory cannot vouch
                                     for itself
    pk.control=…                     what goes wrong on purpose (see CONTROLS)

Lines that begin with "PK " are for the host; the last one is PASS or FAIL.
"""

import glob
import hashlib
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, "/guest")
LINE = Path("/proc/cmdline").read_text().strip()
WORDS = dict(([*word.split("=", 1), ""])[:2] for word in LINE.split())
SYSTEMD = "pk.systemd" in WORDS
STAGE, KEXECS, BACKEND = int(WORDS["pk.stage"]), int(WORDS["pk.kexecs"]), WORDS["pk.backend"]
CONTROL = WORDS.get("pk.control", "")
MEMMAP = next(word for word in [*LINE.split(), "memmap="] if word.startswith("memmap="))
MNT, MACHINE = Path("/mnt/pk"), "/dev/shm/pkram/default"
OTHER = Path("/mnt/other")
"""A second tree, which the control `metadata` damages: the first one must come back without it."""


def say(*words: object) -> None:
    uptime = Path("/proc/uptime").read_text().split()[0]
    print("PK", f"[{uptime}]", *words, flush=True)


def sh(command: str, *, fails: bool = False) -> str:
    """Type a command, show what it says, and return that."""
    say("#", command)
    done = subprocess.run(["/bin/bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in done.stdout.strip().splitlines():
        say("  ", line)
    if (done.returncode != 0) is not fails:
        raise SystemExit(f"status {done.returncode}")
    return done.stdout


def wait(path: str) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if found := glob.glob(path):
            return found[0]
        time.sleep(0.05)
    raise SystemExit(f"no {path}")


# -- memory ---------------------------------------------------------------------------------------


def make_memory() -> str:
    """Make, at the first boot, what --ram names."""
    if BACKEND == "devmem":
        size, _, address = MEMMAP.removeprefix("memmap=").partition("$")
        return f"/dev/mem:{size}@{address}"
    if BACKEND == "fsdax":
        wait("/dev/pmem0")
        sh("mke2fs -q -t ext4 -b 4096 -O ^has_journal -m 0 /dev/pmem0")
        find_memory()
        size = os.statvfs("/run/pm").f_bavail * 4096 * 9 // 10
        return f"/run/pm/ram:{size >> 20}M"
    wait("/sys/bus/nd/devices/namespace0.0")
    seed = wait("/sys/bus/nd/devices/dax0.0")
    if os.path.islink("/sys/bus/nd/devices/namespace0.0/driver"):
        put("/sys/bus/nd/devices/namespace0.0/driver/unbind", "namespace0.0")
    for name, value in (("align", 2 << 20), ("mode", "ram"), ("uuid", uuid.uuid4()), ("namespace", "namespace0.0")):
        put(f"{seed}/{name}", value)
    put("/sys/bus/nd/drivers/dax_pmem/bind", "dax0.0")  # what `ndctl create-namespace -m devdax -M mem` does
    return wait("/dev/dax0.0")


def find_memory() -> None:
    """Wait, at every boot, until the memory is there."""
    if BACKEND == "fsdax":
        wait("/dev/pmem0")
        os.makedirs("/run/pm", exist_ok=True)
        sh("mount -t ext4 -o dax=always /dev/pmem0 /run/pm")
    elif BACKEND == "devdax" and CONTROL != "nomemmap":
        wait("/dev/dax0.0")


def put(path: str, value: object) -> None:
    Path(path).write_text(str(value))


def flip(address: int) -> None:
    """Flip a bit of the machine's memory, behind everybody's back."""
    from pkramfs.machine.directory import Machine

    ram = Machine(MACHINE).ram()
    ram.fill(address, memoryview(bytes([ram.peek(address >> 12)[address & 4095] ^ 1])))
    ram.close()


# -- the tree -------------------------------------------------------------------------------------


def populate() -> None:
    (MNT / "dir").mkdir()
    for number in range(50):
        (MNT / "dir" / f"file-{number}").write_bytes(os.urandom(number * 997))
    (MNT / "testfile").write_bytes(os.urandom(int(WORDS.get("pk.mib", "24")) << 20))
    os.link(MNT / "testfile", MNT / "hard")
    os.symlink("dir/file-1", MNT / "link")
    os.mkfifo(MNT / "fifo", 0o640)
    os.setxattr(MNT / "dir", "user.colour", b"grey")


def digest() -> str:
    """Return a digest of all names, kinds, links, attributes and bytes."""
    whole = hashlib.sha256()
    for path in [MNT, *sorted(MNT.rglob("*"))]:
        found = path.lstat()
        facts: list[object] = [path.relative_to(MNT), found.st_mode, found.st_uid, found.st_nlink, found.st_mtime_ns]
        if path.is_symlink():
            facts.append(os.readlink(path))
        elif path.is_file():
            facts += [found.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        if not path.is_symlink():
            facts += [(name, os.getxattr(path, name)) for name in sorted(os.listxattr(path))]
        whole.update(repr(facts).encode())
    return whole.hexdigest()


# -- the stages -----------------------------------------------------------------------------------


def mount(*, fails: bool = False) -> str:
    MNT.mkdir(exist_ok=True)
    OTHER.mkdir(exist_ok=True)
    return sh(f"mount -t pkramfs -o pkram=mytmpfs{',verify=data' * (CONTROL == 'data')} none {MNT}", fails=fails)


def next_line(what: str, *, pkram: bool = True) -> str:
    """Return the next command line as the announcement composes it, with the test's own words."""
    kept = [word for word in LINE.split() if not word.startswith(("pk.stage=", "pk.digest=", "pkram="))]
    if CONTROL == "nomemmap":
        kept = [word for word in kept if not word.startswith("memmap=")]
    said = f" pkram={Path('/run/pkram/pkram').read_text().strip()}" if pkram else ""
    return f"{' '.join(kept)} pk.stage={STAGE + 1} pk.digest={what}{said}"


def kexec(what: str) -> None:
    """Steps 4 and 5: by pkram-kexec, and every other time by kexec(8) alone, as the announcement does."""
    to = WORDS["pk.to"] if STAGE % 2 == 0 else WORDS["pk.from"]
    line = next_line(what, pkram=CONTROL != "nopkram")
    files = f"/boot/vmlinuz-{to} --initrd=/boot/initrd-{to}"
    by_hand = not SYSTEMD and (bool(CONTROL) or STAGE % 2 == 1)
    os.environ["LINE"] = line
    if CONTROL in ("nopkram", "nomemmap"):  # ours would not
        sh(f'pkram-kexec -s -l {files} --append="$LINE"', fails=True)
    if by_hand:
        sh(f'kexec -s -l {files} --append="$LINE"')
        sh(f"umount {MNT} {OTHER if CONTROL == 'metadata' else ''}")
        os.sync()
        say("KEXEC by kexec(8)")
        sh("kexec -e")
    sh(f'pkram-kexec -s -l {files} --append="$LINE"')
    sh("pkram-kexec -e --dry-run")
    say("KEXEC by pkram-kexec")
    sh("pkram-kexec -e")
    if SYSTEMD:
        sys.exit(0)  # systemd stops this service, preserves, unmounts and boots
    raise SystemExit("kexec came back")


def first() -> None:
    spec = make_memory()
    sh(f"pkramctl machine create --ram {spec}")
    sh("cat /etc/pkramfs/default.conf")
    if SYSTEMD:
        install()
    else:
        mount()
    if CONTROL == "metadata":
        sh(f"mount -t pkramfs -o pkram=other none {OTHER}")
        (OTHER / "file").write_bytes(os.urandom(5 << 20))
        sh(f"mount -o remount,preserve,ro {OTHER}")
    populate()
    before = digest()
    say("SUM", before)
    if not SYSTEMD:
        sh(f"mount -o remount,preserve,ro{',verify' * (CONTROL == 'data')} {MNT}")
        sh("pkramctl status")
    damage()
    kexec(before)


def install() -> None:
    """What an administrator does once, so that systemd does the rest at every boot."""
    MNT.mkdir(exist_ok=True)
    sh("pkramctl install; udevadm control --reload; udevadm trigger --settle --subsystem-match=dax")
    where = "x-systemd.requires-mounts-for=/run/pm" if BACKEND == "fsdax" else "x-systemd.requires=dev-dax0.0.device"
    with open("/etc/fstab", "a") as fstab:
        if BACKEND == "fsdax":
            fstab.write("/dev/pmem0 /run/pm ext4 dax=always 0 0\n")
        fstab.write(f"none {MNT} pkramfs pkram=mytmpfs,nofail,x-systemd.mount-timeout=20min,{where} 0 0\n")
    sh("cat /etc/fstab; systemctl daemon-reload; systemctl enable pkramfs-preserve@mnt-pk.service")
    sh("systemctl start mnt-pk.mount pkramfs-preserve@mnt-pk.service")


def damage() -> None:
    """Do what the control asks for."""
    if CONTROL == "metadata":
        from pkramfs.kernel.running import look
        from pkramfs.machine.directory import Machine

        (node,) = (node for node in look(Machine(MACHINE)).store.nodes() if node.name == b"shmem-other")
        flip((node.pfn << 12) + 200)
    elif CONTROL == "data":
        from pkramfs.archive.view import open_tree
        from pkramfs.kernel.running import look
        from pkramfs.machine.directory import Machine

        tree = open_tree(look(Machine(MACHINE)).store, b"shmem-mytmpfs")
        _, pfn, _ = next(tree._data_runs(tree.find(b"/testfile")))
        flip((pfn << 12) + 5000)
    elif CONTROL == "firmware":
        sh(f"umount {MNT}")
        os.sync()
        say("RESET through firmware")
        put("/proc/sysrq-trigger", "b")
        time.sleep(60)


CONTROLS = {
    "nopkram": "the command line of this boot has no pkram=",
    "nomemmap": "cannot open RAM: /dev/dax0.0: No such file or directory",
    "metadata": "checksum",
    "firmware": "memory went through firmware",
    "data": "are damaged between byte 0 and 1048576",
}


def again() -> None:
    if SYSTEMD:
        sh("systemctl --no-pager status mnt-pk.mount pkramfs-preserve@mnt-pk.service || true; findmnt /mnt/pk")
    else:
        find_memory()
        if CONTROL == "data":
            noticed(CONTROLS[CONTROL])
            return
        if CONTROL:
            refused(CONTROLS[CONTROL])
            return
        mount()
    compare()
    sh("pkramctl boot; cat /run/pkram/dmesg")
    assert "kexec boot of linux" in Path("/run/pkram/dmesg").read_text()
    sh("pkramctl report | head -4; pkramctl verify")
    if STAGE < KEXECS:
        (MNT / f"more-{STAGE}").write_bytes(os.urandom(300_000))
        after = digest()
        if not SYSTEMD:
            sh(f"mount -o remount,preserve,ro {MNT}")
        kexec(after)
    print("PK RESULT PASS", flush=True)
    end()


def end() -> None:
    """Switch the guest off, which systemd would do in its own time."""
    if SYSTEMD:
        os.sync()
        sh("busybox poweroff -f")


def compare() -> None:
    found = digest()
    say("SUM", found)
    if found != WORDS["pk.digest"]:
        raise SystemExit("the tree is another one")


def refused(message: str) -> None:
    said = mount(fails=True)
    if message not in said:
        raise SystemExit(f"expected: {message}")
    if CONTROL == "nopkram":  # what the refusal tells to do helps
        words = said.partition("`")[2].partition("`")[0]
        sh(words)
        mount()  # it is mounted already: memory knew where
        compare()
    elif CONTROL == "metadata":  # what can be read comes back to where it was, and the loss is named
        sh("pkram-kexec --resume", fails=True)
        sh("pkram-kexec --resume --force")
        compare()
        assert "which cannot be read, is lost" in sh("cat /run/pkram/dmesg")
    print("PK RESULT PASS", flush=True)


def noticed(message: str) -> None:
    """Mount, and find that a flipped bit is an error where it is, and nowhere else."""
    mount()
    bad, file = [], os.open(MNT / "testfile", os.O_RDONLY)
    for piece in range(os.fstat(file).st_size >> 20):
        try:
            os.pread(file, 1 << 20, piece << 20)
        except OSError as error:
            bad.append((piece, error.errno))
    os.close(file)
    say("EIO in", bad)
    if bad != [(0, 5)] or message not in sh("cat /run/pkram/dmesg"):
        raise SystemExit(f"expected: {message}")
    sh("pkramctl status; pkramctl verify")
    sh("pkramctl verify --data", fails=True)
    (MNT / "testfile").write_bytes(b"written anew")
    sh(f"mount -o remount,preserve,ro,verify {MNT}; pkramctl verify --data")
    print("PK RESULT PASS", flush=True)


def main() -> None:
    say(f"stage {STAGE}, Linux {os.uname().release}, Python {sys.version.split()[0]}")
    if CONTROL == "firmware" and os.path.exists("/etc/pkramfs/default.conf"):
        again()  # QEMU boots with the first command line again
    elif STAGE == 0:
        first()
    else:
        again()


try:
    main()
except BaseException as error:
    if isinstance(error, SystemExit) and not error.code:
        raise
    say("FAILED", type(error).__name__, error)
    for name in glob.glob("/dev/shm/pkram/default/mounts/*.log"):
        say(Path(name).read_text()[-2000:])
    print("PK RESULT FAIL", flush=True)
    end()
    raise
