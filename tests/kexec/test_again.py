# SPDX-License-Identifier: GPL-2.0-or-later
"""What -e mounts again: what is mounted now, as it is mounted now, and nothing else."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from pkramfs.kernel import nvram
from pkramfs.machine.directory import Machine
from pkramfs.machine.files import sealed
from pkramfs.mounting import options as o
from pkramfs.mounting import syscalls

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="binding, moving and entering namespaces is root's"),
]
ODD = os.fsdecode(b"od\xe9d \\ name")


@pytest.fixture(autouse=True)
def taken_down(user):
    """Whatever a test has bound or moved is gone afterwards, before the machine is taken down."""
    yield
    for one in reversed(below(user)):
        with contextlib.suppress(OSError):
            syscalls.umount(one.mountpoint, lazy=True)


def below(user):
    """Every mount at the test's places."""
    return [one for one in syscalls.mounts() if one.mountpoint.startswith(f"{user.root}/")]


def table(user):
    """Where what is mounted: path below the places, tree's part, flags of the mount that are not the default."""
    flags = o.MS_RDONLY | o.MS_NOSUID | o.MS_NODEV | o.MS_NOEXEC | o.MS_NOATIME | o.MS_NOSYMFOLLOW | o.MS_NODIRATIME
    return sorted((os.path.relpath(one.mountpoint, user.root), one.root, one.own & flags) for one in below(user))


def names(user):
    """The names of the trees at their places, the topmost last."""
    devs = {
        entry["dev"]: entry["name"]
        for entry in map(json.loads, (f.read_text() for f in user.files.glob("mounts/*.json")))
    }
    return [(one.mountpoint, devs[one.dev]) for one in below(user)]


def kept(user, name, content=b"data"):
    """A mount of a name with a file in it."""
    path = user.mount(name)
    (path / "file").write_bytes(content)
    return path


def plan(user):
    user.load()
    return user.ok("pkram-kexec", "-e", "-n")


# -- 12: as it is mounted ---------------------------------------------------------------------------


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "words",
    [
        "nosuid",
        "nodev,noexec",
        "noatime",
        "strictatime",
        "nodiratime",
        "sync,dirsync",
        "nosymfollow",
        "nosuid,nodev,noexec,noatime,nosymfollow",
    ],
)
def test_flags_of_a_remount_stay(user, words):
    path = kept(user, "one")
    user.ok("mount", "-i", "-o", f"remount,{words}", path)
    before = syscalls.mounted_at(str(path))
    user.preserve(path)
    user.kexec()
    after = syscalls.mounted_at(str(path))
    assert after.flags == before.flags
    user.kexec()
    assert syscalls.mounted_at(str(path)).flags == before.flags


def test_flags_that_were_taken_back_do_not_return(user):
    path = user.mount("one", "nosuid,noexec,noatime,ro")
    user.ok("mount", "-i", "-o", "remount,suid,exec,strictatime,rw", path)
    before = syscalls.mounted_at(str(path)).flags
    assert before == 0
    user.preserve(path)
    user.kexec()
    assert syscalls.mounted_at(str(path)).flags == before


def test_a_set_uid_file_that_was_disarmed_stays_so(user):
    path = user.mount("one")
    shutil.copyfile("/usr/bin/id", path / "id")
    (path / "id").chmod(0o4755)
    user.root.chmod(0o755)
    user.ok("mount.pkramfs", "none", path, "-o", "remount,nosuid")
    user.preserve(path)
    user.kexec()
    with subprocess.Popen([path / "id", "-u"], stdout=subprocess.PIPE, user=1000, group=1000, extra_groups=[]) as asked:
        assert asked.communicate()[0] == b"1000\n"


@pytest.mark.parametrize("words", ["remount,ro", "-i"])
def test_a_mount_that_was_read_only_before_it_was_preserved_comes_back_so(user, words):
    path = kept(user, "one")
    if words == "-i":
        user.ok("mount", "-i", "-o", "remount,ro", path)
    else:
        user.ok("mount.pkramfs", "none", path, "-o", words)
    user.preserve(path)
    user.preserve(path)
    user.kexec()
    assert syscalls.mounted_at(str(path)).flags & o.MS_RDONLY
    user.ok("mount.pkramfs", "none", path, "-o", "remount,rw")
    user.preserve(path)
    user.kexec()
    assert not syscalls.mounted_at(str(path)).flags & o.MS_RDONLY


def test_bind_mounts_are_made_again_with_their_own_flags(user):
    path = kept(user, "one")
    (path / ODD / "deep").mkdir(parents=True)
    (path / ODD / "deep" / "inside").write_bytes(b"inside")
    whole, part, file = user.directory("whole"), user.directory(ODD), user.directory("x") / "file"
    file.touch()
    user.ok("mount", "--bind", path, whole)
    user.ok("mount", "--bind", path / ODD / "deep", part)
    user.ok("mount", "--bind", path / "file", file)
    user.ok("mount", "-o", "remount,bind,ro,nosuid,noatime", part)
    user.ok("mount", "-o", "remount,bind,nodev,noexec", file)
    before = table(user)
    user.preserve(path)
    said = plan(user)
    for place in (whole, file):
        assert f"again on {place} " in said
    assert str(whole) in user.kexec()
    assert table(user) == before
    assert (part / "inside").read_bytes() == b"inside" and file.read_bytes() == (whole / "file").read_bytes() == b"data"
    with pytest.raises(OSError, match="Read-only"):
        (part / "inside").write_bytes(b"")
    user.kexec()
    assert table(user) == before


def test_the_next_write_to_a_bind_mount_does_not_go_astray(user):
    path, place = kept(user, "one"), user.directory("place")
    user.ok("mount", "--bind", path, place)
    user.preserve(path)
    user.kexec()
    (place / "new").write_bytes(b"new")
    assert (path / "new").read_bytes() == b"new"


def test_a_bind_mount_that_cannot_be_made_again_is_named(user):
    path = kept(user, "one")
    (path / "part").mkdir()
    place = user.directory("home") / "place"
    place.mkdir()
    user.ok("mount", "--bind", path / "part", place)
    user.ok("mount", "-t", "tmpfs", "none", place.parent)
    user.preserve(path)
    said = (
        f"{place}, a bind mount of /part of one, is not mounted again: {place} is hidden by a mount on {place.parent}"
    )
    assert said in plan(user)
    done = user.run("pkram-kexec", "-e")
    assert done.returncode == 0 and said in done.stderr
    assert (path / "file").read_bytes() == b"data"
    user.ok("umount", place.parent)
    assert syscalls.is_dead(str(place)), "nobody writes into the directory below by mistake"


def test_a_tree_that_was_moved_onto_a_part_of_itself_stays_preserved(user):
    path, place = kept(user, "one"), user.directory("place")
    (path / "part" / "in").mkdir(parents=True)
    user.ok("mount", "--bind", path / "part", place)
    user.ok("mount", "--move", path, place / "in")
    user.preserve(place)
    assert "one: " + f"{place / 'in'} lies on a bind mount of itself; it stays preserved" in plan(user)
    assert "stays preserved" in user.run("pkram-kexec", "-e").stderr
    assert (user.mount("one") / "file").read_bytes() == b"data"


def test_a_mount_that_was_moved_comes_back_where_it_is(user):
    path, place = kept(user, "one"), user.directory("place")
    user.ok("mount", "--move", path, place)
    (status,) = json.loads(user.ok("pkramctl", "--json", "status"))["mounts"]
    assert (status["mountpoint"], status["places"]) == (str(place), [str(place)])
    user.preserve(place)
    user.kexec()
    assert (place / "file").read_bytes() == b"data"
    assert not os.path.ismount(path)


def test_a_mount_below_a_directory_that_was_renamed_comes_back_there(user):
    path = kept(user, "one")
    path.parent.rename(user.root / "to")
    place = user.root / "to" / "one"
    path.mkdir(parents=True)
    assert f"{place} " in user.ok("pkramctl", "status")
    user.preserve(place)
    user.kexec()
    assert (place / "file").read_bytes() == b"data"
    assert not os.path.ismount(path)


def test_mounting_a_name_elsewhere_says_at_once_where_it_is(user):
    path, place, third = kept(user, "one"), user.directory("place"), user.directory("third")
    user.ok("mount", "--move", path, place)
    began = time.monotonic()
    assert f"one is mounted on {place} already" in user.refused(32, "mount.pkramfs", "none", path, "-o", "pkram=one")
    assert f"one is mounted on {place} already" in user.refused(32, "mount.pkramfs", "none", third, "-o", "pkram=one")
    assert time.monotonic() - began < 25, "it waited for a daemon that lives"
    assert "already mounted on" in user.ok("mount.pkramfs", "none", place, "-o", "pkram=one")


def test_trees_in_trees_and_their_bind_mounts_come_back_in_order(user):
    top = kept(user, "one")
    (top / "in").mkdir()
    inner = top / "in"
    user.ok("mount.pkramfs", "none", inner, "-o", "pkram=two")
    (inner / "deeper").mkdir()
    other = user.directory("a")
    user.ok("mount", "--bind", inner, other)
    user.ok("mount.pkramfs", "none", other / "deeper", "-o", "pkram=three")
    (other / "deeper" / "bottom").write_bytes(b"bottom")
    for place in (other / "deeper", inner, top):
        user.preserve(place)
    before = table(user)
    user.kexec()
    assert [one[:2] for one in table(user)] == [one[:2] for one in before]
    assert (other / "deeper" / "bottom").read_bytes() == b"bottom"
    assert not (inner / "deeper" / "bottom").exists()


# -- 19: only what is mounted ------------------------------------------------------------------------


def test_a_tree_that_is_mounted_in_another_namespace_stays_preserved(user):
    """A container's mount must not cover the host's directory of that name."""
    host = user.directory("host")
    (host / "own").write_bytes(b"the host's")
    script = (
        f"mount.pkramfs none {host} -o pkram=inside && echo data > {host}/file && "
        f"mount.pkramfs none {host} -o remount,preserve,ro && echo ready && read line"
    )
    with contained(user, script) as pid:
        at_once = user.refused(32, "mount.pkramfs", "none", user.directory("x"), "-o", "pkram=inside")
        assert f"inside is mounted on {host} in the mount namespace of pid" in at_once
        said = plan(user)
        assert f"inside: it is mounted on {host} in the mount namespace of pid" in said and "stays preserved" in said
        assert "again on" not in said
        done = user.run("pkram-kexec", "-e")
        assert (done.returncode, "stays preserved" in done.stderr) == (0, True), pid
    assert (host / "own").read_bytes() == b"the host's"
    assert below(user) == []
    path = user.mount("inside")
    assert (path / "file").read_bytes() == b"data\n"


def test_a_copy_in_another_namespace_is_named(user):
    path = kept(user, "one")
    user.preserve(path)
    place = user.directory("place")
    with contained(user, f"mount --bind {path} {place} && umount {path} && echo ready && read line") as pid:
        said = plan(user)
        assert "one is mounted in other mount namespaces, too, and not mounted again there: " in said
        assert f"on {place} in that of pid {pid}" in said


def test_what_was_lazily_unmounted_does_not_come_back(user):
    path = kept(user, "one")
    user.preserve(path)
    with open(path / "file", "rb"):
        user.ok("umount", "-l", path)
        assert "(no longer, or in another mount namespace)" in user.ok("pkramctl", "status")
        said = plan(user)
        assert f"one: it was unmounted from {path} and is still in use, so it is not mounted again" in said
        done = user.run("pkram-kexec", "-e")
        assert (done.returncode, "stays preserved" in done.stderr) == (0, True)
        assert not os.path.ismount(path)
    user.mount("one")
    assert (path / "file").read_bytes() == b"data"


@pytest.mark.parametrize("where", ["over", "above"])
def test_what_is_covered_is_not_mounted_over_the_cover(user, where):
    path = kept(user, "one")
    user.preserve(path)
    cover = path if where == "over" else path.parent
    user.ok("mount", "-t", "tmpfs", "none", cover)
    user.load()
    done = user.run("pkram-kexec", "-e")
    assert done.returncode == 0 and "stays preserved" in done.stderr
    assert "tmpfs" in done.stderr
    user.ok("umount", cover)
    user.ok("mount.pkramfs", "none", path, "-o", "pkram=one")
    assert (path / "file").read_bytes() == b"data"


def test_what_others_mounted_in_a_tree_is_named(user):
    path = kept(user, "one")
    (path / "in").mkdir()
    user.ok("mount", "-t", "tmpfs", "none", path / "in")
    user.preserve(path)
    assert f"{path / 'in'} (tmpfs) is mounted inside a tree and is not mounted again" in plan(user)


@contextlib.contextmanager
def contained(user, script):
    """Run a shell in a mount namespace of its own until the block ends; it has said `ready`."""
    words = ["unshare", "-m", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as shell:
        try:
            assert shell.stdout.readline() == b"ready\n"
            yield shell.pid
        finally:
            shell.stdin.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)


# -- 20: several trees on one directory ---------------------------------------------------------------


def test_three_trees_on_one_mount_point_keep_their_order(user):
    path = user.directory("here")
    for name in ("zz", "mm", "aa"):
        user.ok("mount.pkramfs", "none", path, "-o", f"pkram={name}")
        (path / name).touch()
        user.preserve(path)
    before = names(user)
    assert [name for _, name in before] == ["zz", "mm", "aa"]
    user.kexec()
    assert names(user) == before
    for name in ("aa", "mm", "zz"):
        assert [one.name for one in path.iterdir()] == [name]
        user.unmount(path)


# -- 3: what a user planted ---------------------------------------------------------------------------


def interrupted(user):
    """A kexec that mounts nothing again: what it would have mounted is listed, for --resume."""
    from pkramfs.cli import again, daemons

    user.load()
    machine = Machine.locate()
    wanted = again.plan(daemons.look(machine)).mounts
    user.ok("pkram-kexec", "-e", "--no-remount")
    machine.write_json("nvram.json", nvram.read(machine) | {"mounts": wanted})


@pytest.mark.parametrize("kind", ["last", "above", "other"])
def test_resume_does_not_follow_what_was_planted(user, kind):
    home = user.directory("home")
    path = home / "dir" / "m"
    path.mkdir(parents=True)
    user.ok("mount.pkramfs", "none", path, "-o", "pkram=one")
    (path / "file").write_bytes(b"data")
    user.preserve(path)
    interrupted(user)
    target = user.directory("target")
    (target / "m").mkdir()
    (target / "own").write_bytes(b"root's")
    plant(path, target, kind)
    done = user.run("pkram-kexec", "--resume")
    assert done.returncode == 1
    assert ("symbolic link" if kind != "other" else "it is another directory") in done.stderr, done.stderr
    assert below(user) == []
    user.mount("one")
    assert (user.directory("one") / "file").read_bytes() == b"data"


def plant(path, target, kind):
    if kind == "last":
        path.rmdir()
        path.symlink_to(target)
    elif kind == "above":
        path.parent.rename(path.parent.parent / "away")
        path.parent.symlink_to(target)
    else:
        path.rename(path.parent / "was")
        target.rename(path)


@pytest.mark.parametrize("kind", ["last", "above", "other"])
def test_a_bind_mount_is_not_made_where_something_was_planted(user, kind):
    tree, place = kept(user, "one"), user.directory("home") / "dir" / "m"
    place.mkdir(parents=True)
    user.ok("mount", "--bind", tree, place)
    user.preserve(tree)
    interrupted(user)
    target = user.directory("target")
    (target / "m").mkdir()
    plant(place, target, kind)
    done = user.run("pkram-kexec", "--resume")
    assert done.returncode == 1 and f"{place} was not mounted again" in done.stderr
    assert [one.mountpoint for one in below(user)] == [str(tree)]


def test_a_directory_of_the_old_list_is_not_followed_either(user):
    path = kept(user, "one")
    user.preserve(path)
    user.load()
    user.ok("pkram-kexec", "-e", "--no-remount")
    data = json.loads((user.files / "nvram.json").read_text())
    data["mounts"] = [{"name": "one", "mountpoint": str(path), "options": {"pkram": "one"}}]
    del data["checksum"]
    (user.files / "nvram.json").write_text(json.dumps(sealed(data)))
    path.rmdir()
    path.symlink_to(user.directory("target"))
    assert "symbolic link" in user.run("pkram-kexec", "--resume").stderr
    assert below(user) == []
    path.unlink()
    path.mkdir()
    user.ok("pkram-kexec", "--resume")
    assert (path / "file").read_bytes() == b"data"


def test_resume_of_what_is_mounted_in_part_does_not_bind_twice(user):
    path, place = kept(user, "one"), user.directory("place")
    user.ok("mount", "--bind", path, place)
    user.preserve(path)
    interrupted(user)
    wanted = (user.files / "nvram.json").read_text()
    user.ok("pkram-kexec", "--resume")
    before = table(user)
    (user.files / "nvram.json").write_text(wanted)
    user.ok("pkram-kexec", "--resume")
    assert table(user) == before and len(before) == 2


# -- 27: in parallel ----------------------------------------------------------------------------------


def test_many_mounts_come_back(user):
    paths = [kept(user, f"tree{number}", b"%d" % number) for number in range(8)]
    for path in paths:
        user.preserve(path)
    user.kexec()
    assert [(path / "file").read_bytes() for path in paths] == [b"%d" % number for number in range(8)]
    assert json.loads((user.files / "nvram.json").read_text())["mounts"] == []
