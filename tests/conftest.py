# SPDX-License-Identifier: GPL-2.0-or-later
"""Options, order and clean-up of the whole suite."""

import os
import random
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest

from tests.support.places import memory_directory, mounted, take_down

ORDER = (
    *(
        "prelude",
        "architecture",
        "mounting",
        "machine",
        "pkram",
        "kernel",
        "fs",
        "fuse",
        "control",
        "archive",
        "daemon",
        "cli",
    ),
    *("mount", "kexec", "conformance", "programs"),
)
"""Lowest chapter first, so that the lowest broken one reports first."""
ROOTS_USED: list[str] = []
PLACE = pytest.StashKey[Path]()
"""A directory of this run's own: two runs share no name, whoever starts them."""
FAILED = pytest.StashKey[bool]()
T = TypeVar("T")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long forms, too")
    parser.addoption("--seed", type=int, default=0, help="seed of the random tests (printed)")


@pytest.hookimpl(tryfirst=True)  # before pytest takes basetemp
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        keep_apart(config)
    seed = config.getoption("--seed")
    hypothesis.settings.register_profile(
        "default",
        derandomize=seed == 0,
        deadline=None,
        max_examples=1000 if config.getoption("--long") else 100,
        suppress_health_check=list(hypothesis.HealthCheck),
        database=None,
    )
    hypothesis.settings.load_profile("default")
    random.seed(seed)
    if seed:
        hypothesis.core.global_force_seed = seed


def keep_apart(config: pytest.Config) -> None:
    """Give this run directories that no other run takes, opens, closes or clears.

    By default all runs of a user share /tmp/pytest-of-USER: each sets its mode back to 0700, which shuts out the other
    users that a test of another run has let in, and removes the directories of all but the three newest runs.
    """
    place = config.stash[PLACE] = Path(tempfile.mkdtemp(prefix="pkram-run-"))
    if config.option.basetemp is None:
        config.option.basetemp = str(place / "tmp")
    os.environ["PKRAM_ROOT"] = str(place / "machines")  # of a test that asks for none: never the user's own


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[FAILED] = exitstatus == pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave this run's files only where a test failed."""
    place = config.stash.get(PLACE, None)
    if place is not None and not config.stash.get(FAILED, False):
        shutil.rmtree(place, ignore_errors=True)


def pytest_report_header(config: pytest.Config) -> str:
    place = config.option.basetemp or config.stash[PLACE]
    return f"seed: {config.getoption('--seed')} (--seed N for another), files: {place} (kept if a test fails)"


@pytest.hookimpl(trylast=True)  # after what -k and -m choose, and after the chapters' own order
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items)
    rank = {name: number for number, name in enumerate(ORDER)}
    items.sort(key=lambda item: rank.get(Path(item.fspath).parent.name, len(ORDER)))
    reason = fuse_missing()
    for item in items:
        if "slow" in item.keywords and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="the long form: --long runs it"))
        if "mount" in item.keywords and reason and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason=reason))


def few(config: pytest.Config, name: str, many: Sequence[T], count: int) -> list[T]:
    """Return `count` of many in their order, others for each seed and name; all of them with --long."""
    if config.getoption("--long") or len(many) <= count:
        return list(many)
    chosen = random.Random(f"{config.getoption('--seed')} {name}").sample(range(len(many)), count)
    return [many[at] for at in sorted(chosen)]


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out all but the promised number of the cases of tests that are marked `few`."""
    families: dict[str, list[pytest.Item]] = defaultdict(list)
    count = {}
    for item in items:
        if marker := item.get_closest_marker("few"):
            kind = item.callspec.params[marker.kwargs["each"]] if marker.kwargs else ""  # type: ignore[attr-defined]
            name = f"{item.nodeid.partition('[')[0]} {kind}"
            families[name].append(item)
            (count[name],) = marker.args
    left: set[pytest.Item] = set()
    for name, family in families.items():
        left |= {*family} - {*few(config, name, family, count[name])}
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


def fuse_missing() -> str:
    """Why real mounts cannot be made here, or nothing."""
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "fusermount3 is missing and this is not root"
    return ""


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed, for tests that make their own random choices."""
    return int(request.config.getoption("--seed"))


@pytest.fixture
def some(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Return what takes some of the values that a test goes through (see few), others for each `turn`."""
    return lambda many, count, turn="": few(request.config, f"{request.node.nodeid} {turn}", many, count)


@pytest.fixture
def damaged() -> None:
    """For tests that damage memory on purpose: it is not checked afterwards."""


def unsound(root: Path) -> list[str]:
    """What `pkramctl verify` finds wrong in the machines below a root; nothing where none is up."""
    from pkramfs.cli import verify
    from pkramfs.errors import PkramfsError
    from pkramfs.kernel import running
    from pkramfs.machine.directory import Machine

    problems = []
    for found in sorted(root.glob("*/kernel.json")):
        try:
            kernel = running.look(Machine(str(found.parent)))
        except PkramfsError:
            continue  # a machine that is down has nothing to be checked yet
        if kernel.info.pkram:
            problems += [f"{found.parent.name}: {line}" for line in verify.check(kernel, [])[1]]
    return problems


@pytest.fixture
def pkram_root(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of its own for machines; whatever is mounted or runs there at the end is taken down.

    What is preserved there must be sound by then, unless the test asked for `damaged`.
    """
    root = memory_directory()
    monkeypatch.setenv("PKRAM_ROOT", str(root))
    ROOTS_USED.append(f"{root}/")
    try:
        yield root
        if "damaged" not in request.fixturenames:
            assert unsound(root) == []
    finally:
        take_down(root)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The suite leaves no mounts of its own behind."""
    yield
    places = (f"{tmp_path_factory.getbasetemp()}/", *ROOTS_USED)
    assert not [point for point in mounted() if point.startswith(places)]


class Host:
    """A small tmpfs as the host's memory, which can be filled to the last page."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def free(self) -> int:
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Take all memory but `leave` bytes, as another user of the file system may."""
        with open(self.directory / "filling", "ab") as file:
            while (left := self.free - leave) > 0:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, left)

    def empty(self) -> None:
        """Give back what `fill` took."""
        (self.directory / "filling").unlink()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """See Host: 64 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    directory = tmp_path / "host"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M,mode=1777", "none", str(directory)], check=True)
    try:
        yield Host(directory)
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
