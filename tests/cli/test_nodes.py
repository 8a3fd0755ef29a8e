# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes without mounts: they survive pkram-kexec, are listed, checked, refused to be lost, and freed."""

import json

import numpy as np
import pytest

from pkramfs.errors import FormatError

PAGES = 700


@pytest.fixture
def machine(root, ctl):
    from pkramfs.machine.directory import Machine

    assert ctl("machine", "create", "--ram", "256M", "--seed", "11")[0] == 0
    return Machine.locate()


def save(machine, name: bytes, seed: int = 1):
    """Preserve a node of PAGES pages; the claim of its owner, who lives until it is released."""
    from pkramfs.kernel import running
    from pkramfs.machine.frames import Frames
    from pkramfs.machine.leases import new_tree_id

    with running.shared(machine) as kernel:
        tree_id = new_tree_id()
        claim = machine.claim(tree_id)
        frames = Frames(kernel.ram, kernel.leases, tree_id)
        runs = frames.allocate(PAGES)
        for start, count in runs:
            words = kernel.ram.words(start, count)
            words[:] = np.random.default_rng([seed, start]).integers(0, 1 << 63, len(words), dtype=np.uint64)
        with kernel.store.prepare_save(name, tree_id=tree_id, frames=frames) as node:
            with node.object() as tree:
                tree.write(b"bytes")
                index = np.cumsum([0, *(count for _, count in runs)][:-1])
                tree.save_runs(index, [start for start, _ in runs], [count for _, count in runs])
            node.finish()
    return claim


def digest(machine, name: bytes) -> list[int]:
    """What a node's pages hold, page by page."""
    from pkramfs.kernel import running

    kernel = running.look(machine)
    with kernel.store.prepare_load(name) as load:
        (tree,) = load
        _, pfns, counts = tree.load_runs()
        runs = zip(pfns.tolist(), counts.tolist(), strict=True)
        pages = [int(kernel.ram.words(pfn, count).sum()) for pfn, count in runs]
        assert tree.read() == b"bytes"
    return pages


def test_nodes_survive_one_kexec_after_another(machine, ctl, kexec):
    save(machine, b"one").release()
    save(machine, b"two", seed=2).release()
    before = digest(machine, b"one"), digest(machine, b"two")
    for generation in (2, 3):
        status, out, err = kexec("-le", "builtin:2M", "--reuse-cmdline", "--poison")
        assert (status, err) == (0, "")
        assert out.startswith(f"kernel {generation} (builtin:2M) is up in ")
        assert (digest(machine, b"one"), digest(machine, b"two")) == before
    nodes = json.loads(ctl("--json", "nodes")[1])
    assert sorted((n["name"], n["state"]) for n in nodes) == [("one", "preserved"), ("two", "preserved")]
    assert all(n["pages"] > PAGES for n in nodes)
    assert ctl("verify")[:2] == (0, "2 nodes checked, nothing is wrong\n")


def test_a_kexec_that_would_lose_a_node_is_refused(machine, ctl, kexec):
    save(machine, b"one").release()
    status, _, err = kexec("-l", "builtin:2M", "--append=quiet")
    assert status == 0
    assert err.startswith("pkram-kexec: warning: 1 node (one), ")
    log = machine.dmesg()
    status, out, err = kexec("-e", "--dry-run")
    assert machine.dmesg() == log
    assert status == 6
    assert "refused: 1 node (one), " in out
    status, _, err = kexec("-e")
    assert status == 6
    assert "append pkram=" in err
    assert "nothing was changed" in err
    assert json.loads(ctl("--json", "status")[1])["kernel"]["generation"] == 1
    assert ctl("verify")[0] == 0


def test_forced_it_is_lost_and_the_log_says_so(machine, ctl, kexec):
    save(machine, b"one").release()
    kexec("-l", "builtin:2M", "--append=quiet")
    status, _, err = kexec("-e", "--force")
    assert status == 0
    assert "1 node" in err
    assert json.loads(ctl("--json", "nodes")[1]) == []
    assert "one" in ctl("dmesg")[1]
    memory = json.loads(ctl("--json", "status")[1])["memory"]
    assert memory["tree"] == 0


def test_free_gives_the_memory_back(machine, ctl):
    save(machine, b"one").release()
    save(machine, b"two").release()
    free = json.loads(ctl("--json", "status")[1])["memory"]["free"]
    status, out, _ = ctl("free", "one")
    assert status == 0
    assert out.startswith("one: ") and out.endswith(" given back\n")
    assert json.loads(ctl("--json", "status")[1])["memory"]["free"] > free
    assert [n["name"] for n in json.loads(ctl("--json", "nodes")[1])] == ["two"]
    assert ctl("free", "two")[0] == 0
    status, _, err = ctl("free", "two")
    assert (status, err) == (9, "pkramctl: no node shmem-two is preserved\n")
    assert ctl("free", "shmem-two")[2] == err, "a node's name as `nodes` shows it"


def test_free_all_leaves_what_a_mount_uses(machine, ctl):
    save(machine, b"one").release()
    claim = save(machine, b"two")
    status, out, err = ctl("free", "--all")
    assert status == 9
    assert "one" in out
    assert "two is in use by a mount" in err
    claim.release()
    assert ctl("free", "--all")[0] == 0
    assert ctl("free", "--all") == (0, "no nodes are preserved\n", "")
    assert ctl("upgrade", "--all") == (0, "no tree is mounted\n", "")


@pytest.mark.parametrize("words", [["free"], ["free", "a", "--all"], ["free", "--all", "--damaged"]])
def test_free_wants_names_or_all(machine, ctl, words):
    status, _, err = ctl(*words)
    assert (status, err) == (2, "pkramctl: give the NAMEs to free, or --all, or --damaged\n")


def test_what_cannot_be_read_is_given_up_and_the_rest_is_of_use_again(machine, ctl):
    for name in (b"one", b"two", b"three"):
        save(machine, name).release()
    pfns = {node["name"]: node["pfn"] for node in json.loads(ctl("--json", "nodes")[1])}
    machine.ram().bytes[(pfns["two"] << 12) + 80] ^= 1
    for words in (["nodes"], ["free", "one"], ["free", "--all"]):
        status, _, err = ctl(*words)
        assert (status, err.count("\n")) == (3, 1)
        assert err.endswith("`pkramctl free --damaged` gives up what cannot be read\n")
    trees = json.loads(ctl("--json", "status")[1])["memory"]["tree"]
    status, out, _ = ctl("free", "--damaged")
    freed = trees - json.loads(ctl("--json", "status")[1])["memory"]["tree"]
    assert (status, out.splitlines()[1]) == (0, f"{freed >> 20}.0 MiB given back")
    assert freed > 0
    assert out.startswith(f"given up: Node at pfn {pfns['two']:x}: checksum is ")
    assert [node["name"] for node in json.loads(ctl("--json", "nodes")[1])] == ["three", "one"]
    assert ctl("free", "--damaged") == (0, "every node can be read\n", "")
    assert "pkram: gave up a node: Node at pfn" in machine.dmesg()


def test_destroy_and_cold_refuse_to_lose_a_node(machine, ctl, kexec):
    save(machine, b"one").release()
    for status, _, err in (ctl("machine", "destroy"), kexec("--cold")):
        assert status == 6
        assert "1 node" in err
    status, out, _ = kexec("--cold", "--force")
    assert status == 0
    assert out == "kernel 2 (builtin) is up with empty memory\n"
    assert json.loads(ctl("--json", "nodes")[1]) == []
    assert ctl("machine", "destroy")[0] == 0


@pytest.mark.parametrize("what", ["superblock", "node", "object", "link", "pagetable"])
def test_inspect_shows_a_sound_record(machine, ctl, what):
    save(machine, b"one").release()
    status, out, err = ctl("--json", "inspect", what)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["problems"] == []
    assert found["fields"] or found["entries"]
    for field in found["fields"]:
        assert field["value"] == "pfn 0" or field["name"] != "other"
    status, out, _ = ctl("inspect", what)
    pfn = next((f["value"] for f in found["fields"] if f["name"] in ("object", "bytes_head") and f["value"]), None)
    assert (status, pfn is None or f" pfn {pfn:x} " in out) == (0, True)


@pytest.mark.usefixtures("damaged")
def test_inspect_says_what_is_wrong_with_a_page(machine, ctl):
    save(machine, b"one").release()
    node = json.loads(ctl("--json", "inspect", "node")[1])
    machine.ram().bytes[(node["pfn"] << 12) + 60] ^= 1
    status, out, _ = ctl("inspect", "node", f"{node['pfn']:x}")
    assert status == 3
    assert "problem: checksum is" in out
    status, out, _ = ctl("inspect", "link", f"{node['pfn']:x}")
    assert "problem: magic is PKRAMnd1, expected PKRAMln1" in out
    assert ctl("verify")[0] == 3


def test_inspect_of_a_hole_allocates_nothing(machine, ctl):
    save(machine, b"one").release()
    backed = machine.ram().backed
    status, out, _ = ctl("inspect", "node", "8000")
    assert status == 3
    assert "the page was never written" in out
    assert machine.ram().backed == backed


@pytest.mark.usefixtures("damaged")
def test_status_shows_a_damaged_list_and_all_the_rest(machine, ctl):
    save(machine, b"one").release()
    super_block = json.loads(ctl("--json", "inspect", "superblock")[1])
    machine.ram().words(super_block["pfn"])[2] = 0xDEAD
    status, out, _ = ctl("status")
    assert status == 0
    assert "problem   nodes: " in out
    assert "generation 1" in out


@pytest.mark.usefixtures("damaged")
def test_a_damaged_super_block_is_a_problem_that_is_mended(machine, ctl):
    from pkramfs.kernel import running

    save(machine, b"zero").release()
    assert ctl("free", "zero")[0] == 0
    pfn = json.loads(ctl("--json", "inspect", "superblock")[1])["pfn"]
    machine.ram().bytes[(pfn << 12) + 40] ^= 1
    problem = f"problem   Super at pfn {pfn:x}: checksum is "
    assert problem in ctl("status")[1] and "`pkramctl free --damaged` mends it" in ctl("status")[1]
    with pytest.raises(FormatError, match=r"; `pkramctl free --damaged` mends it$"):
        running.look(machine).store.generation()
    assert ctl("free", "--damaged")[0] == 0 and "problem" not in ctl("status")[1]
    save(machine, b"one").release()


FLIPPED = [(what, at) for what in ("superblock", "node", "object", "link", "pagetable") for at in (0, 9, 16, 40, 64)]
FLIPPED.remove(("object", 16))  # a published word that objects have no use for


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize(("what", "offset"), FLIPPED)
def test_verify_finds_every_flipped_bit_and_says_it_in_one_line(machine, ctl, what, offset):
    save(machine, b"one").release()
    pfn = json.loads(ctl("--json", "inspect", what)[1])["pfn"]
    machine.ram().bytes[(pfn << 12) + offset] ^= 0x40
    status, out, err = ctl("verify")
    assert (status, out.count("\n"), err) == (3, 1, "")
    assert f"pfn {pfn:x}" in out or what == "pagetable"


@pytest.mark.usefixtures("damaged")
def test_verify_finds_pages_in_somebody_else_s_blocks(machine, ctl):
    from pkramfs.kernel import running

    save(machine, b"one").release()
    kernel = running.look(machine)
    (node,) = kernel.store.nodes()
    kernel.leases.ids[kernel.leases.blocks_of(node.tree_id).starts[:1]] = node.tree_id ^ 1
    status, out, _ = ctl("verify", "one")
    assert status == 3
    assert "in page blocks that are not this tree's" in out


def test_verify_of_a_name_that_is_not_there(machine, ctl):
    save(machine, b"one").release()
    status, out, _ = ctl("verify", "nobody", "one")
    assert (status, out) == (9, "no node shmem-nobody is preserved\n")


def test_a_cold_boot_that_died_hands_nothing_over(machine, ctl, kexec, monkeypatch):
    from pkramfs.errors import MachineError
    from pkramfs.kernel import succession

    def die(*_, **__):
        raise MachineError("the lights went out")

    with monkeypatch.context() as patched:
        patched.setattr(succession, "start_boot", die)
        assert kexec("-l", "builtin")[0] == 8
    assert "the boot of generation 1 is not finished" in ctl("status")[1]
    assert ctl("machine", "destroy")[0] == 0


def test_a_dry_run_loads_and_boots_nothing(machine, ctl, kexec):
    assert kexec("-n", "-le", "builtin:3M", "--reuse-cmdline")[0] == 0
    assert kexec("--status")[1].startswith("kernel: none is loaded\n")
    assert ctl("status")[1].splitlines()[1] == "kernel    none is running"


def test_free_damaged_destroys_no_node_that_is_whole(machine, ctl):
    """The list breaks at the super block, and at a node: what is behind is found by its own pages."""
    for name in (b"one", b"two", b"three"):
        save(machine, name).release()
    before = {name: digest(machine, name) for name in (b"one", b"two", b"three")}
    nodes = json.loads(ctl("--json", "nodes")[1])
    memory = json.loads(ctl("--json", "status")[1])["memory"]
    super_pfn = json.loads(ctl("--json", "inspect", "superblock")[1])["pfn"]
    for pfn in (super_pfn, nodes[0]["pfn"], nodes[1]["pfn"]):
        machine.ram().bytes[(pfn << 12) + 17] ^= 0x10
        status, out, _ = ctl("verify")
        assert status == 3 and "; out of reach, but whole: " in out
        status, out, _ = ctl("free", "--damaged")
        assert status == 0
        assert "given up" not in out and "found: " in out and out.endswith("0 B given back\n")
        assert {name: digest(machine, name) for name in before} == before
        assert ctl("verify")[0] == 0
    assert json.loads(ctl("--json", "status")[1])["memory"] == memory


def test_what_is_given_up_is_named_with_its_tree_before_it_is(machine, ctl, monkeypatch):
    from pkramfs.kernel.running import Running

    for name in (b"one", b"two"):
        save(machine, name).release()
    two, one = json.loads(ctl("--json", "nodes")[1])
    machine.ram().bytes[(two["pfn"] << 12) + 16] ^= 1
    machine.ram().bytes[(one["pfn"] << 12) :][:8] = bytes(8)
    logged = []
    monkeypatch.setattr(Running, "sweep", lambda self: logged.append(machine.dmesg()) or 0)
    status, out, _ = ctl("free", "--damaged")
    assert status == 0
    assert f"given up: tree {one['tree_id']}: no node that can be read names it" in out
    assert f"tree {one['tree_id']}" in logged[0]
    assert [node["name"] for node in json.loads(ctl("--json", "nodes")[1])] == ["two"]


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("word", [0, 1 << 50, 1])
def test_a_damaged_lease_word_is_refused_and_named(machine, ctl, word):
    from pkramfs.kernel import running

    save(machine, b"one").release()
    save(machine, b"two").release()
    before = digest(machine, b"one")
    kernel = running.look(machine)
    block = int(kernel.leases.blocks_of(kernel.store.find(b"one").tree_id).starts[0])
    kernel.leases.ids[block] = word and int(kernel.leases.ids[block]) ^ word
    for words in (["free", "two"], ["free", "--all"]):
        status, out, err = ctl(*words)
        assert (status, out, err.count("\n")) == (3, "", 1)
        assert f"owner of page block {block:x} is " in err
    assert ctl("verify")[0] == 3
    assert digest(machine, b"one") == before
    status, out, _ = ctl("free", "--damaged")
    assert status == 0 and out.startswith("mended: Lease table at pfn ")
    assert ctl("verify")[0] == 0
    assert digest(machine, b"one") == before
