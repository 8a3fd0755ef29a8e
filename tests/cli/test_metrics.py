# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl metrics: Prometheus reads what it prints and serves, and the dashboard asks for what is there."""

import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import pkramfs
from tests.support.lab import Boots
from tests.support.preserved import Trees, outlived

DASHBOARD = Path(pkramfs.__file__).parent / "resources" / "grafana" / "pkramfs.json"


def parsed(text: str) -> dict[str, list]:
    """The samples of an exposition by their name, as Prometheus' own parser reads them."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, list] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def value(found: dict[str, list], metric: str, /, **labels: str) -> float:
    (sample,) = [one for one in found[metric] if labels.items() <= one.labels.items()]
    return sample.value


def test_no_machine_is_a_machine_that_is_down(root, ctl):
    status, out, err = ctl("metrics")
    assert (status, err) == (0, "") and value(parsed(out), "pkramfs_up") == 0
    assert not os.listdir(root)


def test_a_machine_in_use(machine, ctl, kexec):
    assert value(parsed(ctl("metrics")[1]), "pkramfs_up") == 0
    lab = Boots(machine)
    lab.preserve('n"\\\n\udcff', 700)  # a label must be UTF-8, and its quotes escaped
    assert kexec("-le", "builtin:2M", "--reuse-cmdline")[0] == 0
    found = parsed(ctl("metrics")[1])
    assert value(found, "pkramfs_up") == 1 and value(found, "pkramfs_problems") == 0
    assert value(found, "pkramfs_kernel_generation") == 2
    assert value(found, "pkramfs_kernel_info", kind="kexec", image="builtin:2M") == 1
    assert value(found, "pkramfs_kexec_pause_seconds") > 0
    assert value(found, "pkramfs_boot_phase_seconds", phase="find") > 0
    assert value(found, "pkramfs_node_bytes", node='n"\\\\n\\xff', state="preserved") >= 700 * 4096
    memory = sum(sample.value for sample in found["pkramfs_memory_bytes"])
    assert memory == 256 << 20


def test_what_cannot_be_read_hides_nothing(machine, ctl, damaged):
    lab = Boots(machine)
    lab.preserve("one", 700)
    (node,) = lab.up().store.nodes()
    lab.up().ram.words(node.pfn)[:] = 7
    found = parsed(ctl("metrics")[1])
    assert value(found, "pkramfs_problems") > 0 and value(found, "pkramfs_kernel_generation") == 1


def test_a_tree_that_has_outlived_its_daemon_is_measured_as_down(machine, ctl):
    lab = Trees(machine)
    lab.up()
    with outlived(lab, "z"):
        found = parsed(ctl("metrics")[1])
        assert value(found, "pkramfs_mount_up", name="z") == 0 and "pkramfs_mount_files" not in found


@pytest.mark.mount
def test_a_mount_with_its_requests(machine, ctl, place):
    from pkramfs.cli.mount import main as mount

    where = place()
    assert mount(["none", where, "-o", "pkram=one"]) == 0
    Path(where, "file").write_bytes(bytes(100_000))
    os.stat(os.path.join(where, "file"))
    assert mount(["none", where, "-o", "remount,preserve,ro"]) == 0
    found = parsed(ctl("metrics")[1])
    labels = {"name": "one", "mountpoint": where}
    assert value(found, "pkramfs_mount_up", **labels) == value(found, "pkramfs_mount_preserved", **labels) == 1
    assert value(found, "pkramfs_mount_files", **labels) == 1
    assert value(found, "pkramfs_last_preserve_seconds", name="one") > 0
    assert value(found, "pkramfs_journal_bytes", **labels) > 0 and value(found, "pkramfs_daemon_deaths_total") == 0
    assert value(found, "pkramfs_requests_total", kind="create", **labels) == 1
    assert value(found, "pkramfs_device_bytes_total", direction="received", **labels) > 100_000
    timed = [one for one in found["pkramfs_request_seconds_bucket"] if one.labels["le"] == "+Inf"]
    assert timed and all(one.value >= 1 for one in timed)
    wanted = set(re.findall(r"pkramfs_\w+", DASHBOARD.read_text()))
    assert wanted - {"pkramfs_kexec_pause_seconds"} <= set(found), "the dashboard asks for what is not there"


def test_the_dashboard_is_one():
    found = json.loads(DASHBOARD.read_text())
    numbers = [panel["id"] for panel in found["panels"]]
    assert len(set(numbers)) == len(numbers) and found["uid"] == "pkramfs"
    places = [tuple(panel["gridPos"].values()) for panel in found["panels"]]
    assert all(place[0] + place[2] <= 24 for place in places) and len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("0.0.0.0:9464", "invalid address '0.0.0.0:9464': write unix:PATH or 127.0.0.1:PORT"),
        ("9464", "invalid address '9464'"),
        ("unix:", "invalid address 'unix:'"),
        ("127.0.0.1:x", "invalid port 'x'"),
        ("127.0.0.1:99999", "invalid port '99999'"),
        ("unix:/nowhere/socket", "cannot listen on /nowhere/socket: No such file or directory"),
    ],
)
def test_where_nobody_can_listen(root, ctl, where, message):
    status, out, err = ctl("metrics", "--listen", where)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_a_file_is_not_taken_for_a_socket(root, ctl, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    assert "Address already in use" in ctl("metrics", "--listen", f"unix:{path}")[2]
    assert path.read_text() == "mine"


def serving(where: str) -> tuple[subprocess.Popen[str], str]:
    """pkramctl metrics --listen, and where it says that it serves."""
    command = [sys.executable, "-m", "pkramfs", "ctl", "metrics", "--listen", where]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    ready, _, _ = select.select([server.stdout], [], [], 30)
    line = server.stdout.readline() if ready and server.stdout else ""
    assert line.startswith("serving metrics on "), line
    return server, line.split()[-1]


def ended(server: subprocess.Popen[str]) -> int:
    server.send_signal(signal.SIGTERM)
    try:
        return server.wait(60)
    finally:
        server.kill()
        if server.stdout:
            server.stdout.close()


def test_metrics_are_served_on_a_socket_of_the_user(machine, tmp_path):
    Boots(machine).up()
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))  # left by one that was killed
    server, _ = serving(f"unix:{path}")
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as one:
                one.settimeout(20)
                one.connect(str(path))
                one.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                reply = b"".join(iter(lambda: one.recv(1 << 16), b"")).decode()
            head, _, body = reply.partition("\r\n\r\n")
            assert "200 OK" in head and value(parsed(body), "pkramfs_kernel_generation") == 1
    finally:
        status = ended(server)
    assert status == 143 and not path.exists()


def test_metrics_are_served_on_the_loopback(root):
    server, url = serving("127.0.0.1:0")
    try:
        connection = http.client.HTTPConnection(url.split("/")[2], timeout=20)
        connection.request("GET", "/metrics")
        assert value(parsed(connection.getresponse().read().decode()), "pkramfs_up") == 0
        connection.close()
    finally:
        assert ended(server) == 143
