# SPDX-License-Identifier: GPL-2.0-or-later
"""A tree as a tar archive and back: nothing is lost on the way, and no archive does what it should not."""

import io
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pkramfs.archive import keywords
from pkramfs.archive.claiming import claimed
from pkramfs.archive.export import Report, export
from pkramfs.archive.importing import Owner, fill
from pkramfs.archive.stream import ArchiveError
from pkramfs.archive.tarreader import HEADER_MAX, read
from pkramfs.errors import PkramError
from pkramfs.fs import acl
from pkramfs.fs.limits import Limits
from pkramfs.fs.protection import IMMUTABLE, NODUMP
from pkramfs.fs.save import save
from pkramfs.fs.tree import Tree
from tests.support.preserved import Trees, outlived, write
from tests.support.trees import snapshot

PAGE = 4096
ACL = acl.pack([(1, 7, 0xFFFFFFFF), (2, 6, 7), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 1, 0xFFFFFFFF)])


def everything(tree: Tree) -> None:
    """One of everything that an archive can hold."""
    inode = write(tree, b"a/b/data", os.urandom(3_000_001))
    tree.setxattr(inode.ino, b"user.n=a%3D\xff", bytes(range(256)))
    tree.setxattr(inode.ino, b"trusted.t", b"")
    tree.setxattr(inode.ino, acl.ACCESS, ACL)
    tree.setattr(inode.ino, mtime=-5, atime=1_600_000_000_123_456_789, ctime=7)
    tree.setxattr(tree.lookup(1, b"a").ino, acl.DEFAULT, ACL)
    inode = write(tree, b"\xff\n" + b"n" * 253, b"1", 0o4755)
    tree.link(inode.ino, 1, b"second")
    sparse = write(tree, b"sparse", b"head")
    tree.write(sparse.ino, 1 << 40, b"middle")
    tree.setattr(sparse.ino, size=(1 << 62) + 5)
    some = write(tree, b"allocated", b"y" * PAGE)
    tree.allocate(some.ino, 0, 5 * PAGE + 1)
    tree.setattr(write(tree, b"hole").ino, size=1 << 33)
    write(tree, b"empty")
    tree.symlink(1, b"way", b"t" * 4000)
    tree.mknod(1, b"null", stat.S_IFCHR | 0o666, 0x0103)
    tree.mknod(1, b"pipe", stat.S_IFIFO | 0o666)
    tree.set_flags(write(tree, b"fixed", b"z").ino, IMMUTABLE | NODUMP)
    tree.setattr(1, mode=0o750, uid=3, gid=4)


def drive(work: Any) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def archived(trees: Trees, name: str) -> tuple[bytes, Report]:
    out = io.BytesIO()
    report = drive(export(trees.open(name), out.write))
    return out.getvalue(), report


def imported(trees: Trees, name: str, archive: bytes, owner: Owner | None = None) -> Report:
    kernel, node = trees.up(), b"shmem-" + name.encode()
    with claimed(kernel, node, "import") as frames:
        tree = Tree(kernel.ram, frames, Limits())
        source = io.BytesIO(archive)
        report: Report = drive(fill(tree, "in.tar", read(source.read, "in.tar"), owner or Owner(0, 0)))
        tree.freeze()
        drive(save(tree, kernel.store, node))
    return report


def seen(trees: Trees, name: str) -> dict[bytes, Any]:
    """All that an archive tells of a tree."""
    tree, found = trees.open(name), {}
    for path, place in tree.walk():
        one = tree.attributes(place)
        content = [(offset, data) for offset, data in tree.data(place)]
        found[path] = (one[1:5], one.rdev, one.size, one[7:10], one.flags, tree.xattrs(place), content)
        assert one.kind != stat.S_IFLNK or (found.setdefault(path + b"@", tree.target(place)) or True)
    return found


def test_nothing_is_lost(trees: Trees) -> None:
    trees.plant("x", everything)
    archive, report = archived(trees, "x")
    assert len(archive) % 10240 == 0 and len(archive) < 4_000_000
    assert (report.names, report.left_out) == (14, [])
    assert imported(trees, "y", archive)[:2] == report[:2]
    assert seen(trees, "y") == seen(trees, "x")
    assert archived(trees, "y")[0] == archive
    assert trees.open("y").find(b"second") == trees.open("y").find(b"\xff\n" + b"n" * 253)


def test_the_standard_library_reads_it(trees: Trees) -> None:
    trees.plant("x", everything)
    with tarfile.open(fileobj=io.BytesIO(archived(trees, "x")[0])) as archive:
        found = {member.name.removeprefix("./"): member for member in archive}
        assert found["sparse"].size == (1 << 62) + 5 and found["sparse"].issparse()
        assert found["second"].linkname == "./" + os.fsdecode(b"\xff\n" + b"n" * 253)
        assert found["a/b/data"].pax_headers[keywords.ACL_ACCESS].startswith("user::rwx,user:7:rw-,group::r-x")
        body = archive.extractfile("./allocated")
        assert body is not None and body.read() == b"y" * PAGE + bytes(4 * PAGE + 1)


def test_gnu_tar_reads_it_and_writes_what_we_read(trees: Trees, tmp_path: Path) -> None:
    if shutil.which("tar") is None or os.geteuid() != 0:
        pytest.skip("needs tar, and root for owners and devices")
    trees.plant("x", lambda tree: (write(tree, b"a/b", b"x" * 9000), tree.mknod(1, b"null", 0o20644, 0x0103)))
    (tmp_path / "one").mkdir()
    command = ["tar", "-C", tmp_path / "one", "-xpf", "-"]
    subprocess.run(command, input=archived(trees, "x")[0], check=True, capture_output=True)
    place = tmp_path / "one"
    with open(place / "sparse", "wb") as file:
        file.truncate(1 << 30)
        for number in range(40):
            os.pwrite(file.fileno(), b"part", number << 22)
    (place / ("n" * 200)).mkdir()
    for how in ("gnu", "posix", "ustar"):
        words = ["tar", "-C", place, f"--format={how}", *([] if how == "ustar" else ["-S"]), "-cf", "-"]
        names = ["a", "null"] if how == "ustar" else ["."]
        imported(trees, how, subprocess.run([*words, *names], check=True, capture_output=True).stdout)
        for path, expected in snapshot(place / "a").items():
            tree = trees.open(how)
            one = tree.attributes(tree.find(b"a/" + path))
            assert (one.mode, one.size) == (expected.mode, expected.size) or one.kind == stat.S_IFDIR
    tree = trees.open("gnu")
    assert [offset for offset, _ in tree.extents(tree.find(b"sparse"))] == [number << 22 for number in range(40)]
    assert [data[:4] for _, data in tree.data(tree.find(b"sparse"))] == [b"part"] * 40


def test_a_socket_is_left_out_and_named(trees: Trees) -> None:
    trees.plant("x", lambda tree: tree.mknod(1, b"sock", stat.S_IFSOCK | 0o600))
    assert archived(trees, "x")[1].left_out == [(b"sock", "a socket, which no archive can hold")]


def made(*members: Any, tail: bytes = bytes(1024), **records: str) -> bytes:
    """An archive of (name, type, size or target, content)."""
    out = b""
    for name, kind, target, content in members:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, len(content)
        info.pax_headers = dict(records)
        out += info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)
    return out + tail


def file(name: str, content: bytes = b"x", **records: str) -> bytes:
    return made((name, tarfile.REGTYPE, "", content), **records)


def sparse(content: bytes, size: int = 8192) -> bytes:
    records = {keywords.SPARSE_MAJOR: "1", keywords.SPARSE_MINOR: "0", keywords.SPARSE_SIZE: str(size)}
    return file("f", content, **records)


def padded(text: bytes) -> bytes:
    return text + bytes(-len(text) % 512)


HUGE = tarfile.TarInfo("././@PaxHeader")
HUGE.type, HUGE.size = tarfile.XHDTYPE, 1 << 40
DEVICE = tarfile.TarInfo("f")
DEVICE.type, DEVICE.devmajor = tarfile.CHRTYPE, 1 << 40
LINK = ("a", tarfile.SYMTYPE, "/etc", b"")
BAD = {
    "../f: its name has `..`": file("../f"),
    "a/../../f: its name has `..`": file("a/../../f"),
    "/etc/f: an absolute name": file("/etc/f"),
    "a name of 256 bytes": file("n" * 256),
    "its name leads through a symbolic link, a": made(LINK, ("a/f", tarfile.REGTYPE, "", b"x")),
    "its name leads through a file, f": file("f")[:-1024] + file("f/g"),
    "../../etc/passwd: its name has `..`": made(("f", tarfile.LNKTYPE, "../../etc/passwd", b"")),
    "it links to nothing, which is not before it": made(("f", tarfile.LNKTYPE, "nothing", b"")),
    "d: it is a directory already": made(("d", tarfile.DIRTYPE, "", b""), ("d", tarfile.REGTYPE, "", b"")),
    "the archive ends in the middle": file("f", b"x" * 5000)[:4000],
    "it is empty, which is not a tar archive": b"",
    "the archive has no end, after 1,024 bytes": file("f")[:1024],
    "a size of -5 bytes": file("f", size="-5"),
    "it is compressed with zstd": b"\x28\xb5\x2f\xfdxyz",
    "a damaged header at byte 1,024": file("f")[:-1024] + b"y" * 512,
    "not a tar archive": b"hello" * 1000,
    "it is compressed with gzip": b"\x1f\x8b" + bytes(600),
    "at most 16,777,216 are read": HUGE.tobuf(tarfile.GNU_FORMAT),
    "a map of 1,000,000,000,000 parts": sparse(padded(b"1000000000000\n") + b"x"),
    "does not follow the one before": sparse(padded(b"2\n4096\n1\n0\n1\n") + b"xy"),
    "part 1 of its map, 1 bytes at 8192": sparse(padded(b"1\n8192\n1\n") + b"x"),
    "part 2 of its map, 0 bytes at 0": sparse(padded(b"2\n0\n1\n0\n0\n") + b"x"),
    "its map names 2 bytes, and the archive has 1": sparse(padded(b"1\n0\n2\n") + b"x"),
    "its map is damaged": sparse(padded(b"1\n0\nx\n") + b"x"),
    "bytes, which no file can have": sparse(padded(b"1\n0\n1\n") + b"x", size=1 << 63),
    "mtime is 'soon', which is no number": file("f", mtime="soon"),
    "ACL entry 'usr::x'": file("f", **{keywords.ACL_ACCESS: "usr::x"}),
    "user 'nobody here'": file("f", **{keywords.ACL_ACCESS: "user::rwx,user:nobody here:r--"}),
    "ACL entry 'user:4294967295:r--'": file("f", **{keywords.ACL_ACCESS: "user::rwx,user:4294967295:r--"}),
    "d: ACL entry 'x'": made(("d", tarfile.DIRTYPE, "", b""), **{keywords.ACL_DEFAULT: "x"}),
    "f: no device has the number 1099511627776:0": DEVICE.tobuf(tarfile.GNU_FORMAT),
    "invalid owner": file("f", uid=str(1 << 40)),
    "a member of type b'V'": made(("f", b"V", "", b"")),
}


def test_a_bad_archive_is_refused_with_one_line_and_leaves_nothing(trees: Trees) -> None:
    kernel, wrong = trees.up(), {}
    for said, archive in BAD.items():
        with pytest.raises(ArchiveError, match=r"^in\.tar: ") as error:
            imported(trees, "x", archive)
        if said not in str(error.value) or "\n" in str(error.value):
            wrong[said] = str(error.value)
        assert kernel.store.nodes() == [] and not kernel.leases.trees() and not trees.machine.tree_ids()
    assert wrong == {}


def test_a_file_that_is_all_hole_as_bsdtar_writes_it(trees: Trees) -> None:
    imported(trees, "x", sparse(padded(b"2\n0\n0\n8192\n0\n")))
    tree = trees.open("x")
    place = tree.find(b"/f")
    assert tree.attributes(place).size == 8192 and list(tree.extents(place)) == []


def test_acls_in_attributes_of_a_directory_are_not_inherited(trees: Trees) -> None:
    """GNU tar writes ACLs as attributes, too, with --xattrs-include=*."""
    key = keywords.XATTR + acl.DEFAULT.decode()
    folder = made(("d", tarfile.DIRTYPE, "", b""), **{key: ACL.decode("utf-8", "surrogateescape")})[:-1024]
    imported(trees, "x", folder + made(("d/f", tarfile.REGTYPE, "", b""), ("d/e", tarfile.DIRTYPE, "", b"")))
    tree = trees.open("x")
    assert [tree.xattrs(tree.find(path)) for path in (b"/d/f", b"/d/e")] == [{}, {}]
    assert list(tree.xattrs(tree.find(b"/d"))) == [acl.DEFAULT]


def test_headers_that_are_too_long_together(trees: Trees) -> None:
    with pytest.raises(ArchiveError, match="an extended header of"):
        imported(trees, "x", file("f", comment="y" * HEADER_MAX))


def test_an_end_in_the_middle_is_noticed(trees: Trees) -> None:
    trees.plant("x", lambda tree: write(tree, b"f", bytes(50_000)))
    archive, _ = archived(trees, "x")
    for end in [513, 1000, 1024 * 3, len(archive) // 2]:
        with pytest.raises(ArchiveError, match="the archive ends in the middle"):
            imported(trees, "y", archive[:end])


def test_who_is_not_root(trees: Trees) -> None:
    trees.plant("x", everything)
    archive, _ = archived(trees, "x")
    with pytest.raises(ArchiveError, match="null: it is a device, and only root may make one"):
        imported(trees, "y", archive, Owner(1000, 100))
    trees.plant("z", lambda tree: tree.setxattr(write(tree, b"f").ino, b"trusted.t", b"v"))
    report = imported(trees, "y", archived(trees, "z")[0], Owner(1000, 100))
    assert report.left_out == [(b"./f", "trusted.t, which only root may set")]
    found = trees.open("y").attributes(trees.open("y").find(b"f"))
    assert (found.uid, found.gid) == (1000, 100)


def test_what_comes_twice_replaces_what_was_there(trees: Trees) -> None:
    linked = made(("f", tarfile.REGTYPE, "", b"one"), ("g", tarfile.LNKTYPE, "f", b""), tail=b"")
    imported(trees, "x", linked + made(("g", tarfile.LNKTYPE, "g", b""), ("./d//f", tarfile.REGTYPE, "", b"two")))
    tree = trees.open("x")
    assert tree.attributes(tree.find(b"g")).nlink == 2 and tree.find(b"d/f")
    imported(trees, "y", linked + made(("f", tarfile.SYMTYPE, "g", b"")))
    tree = trees.open("y")
    assert tree.target(tree.find(b"f", follow=False)) == b"g" and tree.attributes(tree.find(b"f")).nlink == 1


def test_a_name_has_one_owner(trees: Trees) -> None:
    trees.plant("x", everything)
    with pytest.raises(PkramError, match="node shmem-x exists already"):
        imported(trees, "x", file("f"))
    with (
        claimed(trees.up(), b"shmem-y", "import"),
        pytest.raises(PkramError, match="y is in use by pkramctl import"),
        claimed(trees.up(), b"shmem-y", "import"),
    ):
        pass
    with outlived(trees, "z"), pytest.raises(PkramError, match="the daemon of z has died and left its tree: mount z"):
        imported(trees, "z", file("f"))
    assert [node.name for node in trees.up().store.nodes()] == [b"shmem-x"]
