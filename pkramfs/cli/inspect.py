# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl inspect: a record that crosses a kexec, field by field, as it lies in memory.

    Node at pfn 3f8
    OFFSET   FIELD      VALUE                MEANING
         0   magic      PKRAMnd1             which record this page holds …
        16   next       pfn 4a10             published: next node

It trusts nothing and follows as little as it can: without a PFN it goes from the super block by the
fields that this very command shows. Problems (magic, checksum, the check of a published word, a pfn
outside of RAM) are listed below the fields, and the status is FormatError's. A page that was
never written is read as zeros without being allocated.

`pkramctl format` prints the same declarations as pkramfs-format(5) has them.

Kernel: crash(8) and drgn's helpers do this for a real kernel
"""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, daemons, render
from pkramfs.cli.render import Column
from pkramfs.errors import FormatError, MachineError
from pkramfs.text import exact
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE, format_pfn

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.ram import Ram
    from pkramfs.record import Record

KINDS = ("superblock", "node", "object", "link", "pagetable", "regions", "seal", "base")


def act(args: argparse.Namespace) -> int:
    """Run `pkramctl inspect WHAT [PFN]`."""
    machine = arguments.existing(args)
    ram = machine.ram()
    pfn = args.pfn if args.pfn is not None else _first(machine, ram, args.what)
    if not 0 < pfn < ram.pages:
        raise FormatError(args.what, "pfn", found=format_pfn(pfn), expected=f"1 to {format_pfn(ram.pages - 1)}")
    found = _page_table(ram, pfn) if args.what == "pagetable" else _record(ram, pfn, args.what)
    if arguments.wants_json(args):
        render.emit_json(found)
    else:
        _show(found)
    return FormatError.exit_status if found["problems"] else 0


def _records() -> "dict[str, tuple[Record, int]]":
    """Return each kind's record and magic."""
    from pkramfs.journal import layout as journal
    from pkramfs.pkram import format as layout

    return {
        "superblock": (layout.SUPER, layout.SUPER_MAGIC),
        "node": (layout.NODE, layout.NODE_MAGIC),
        "object": (layout.OBJECT, layout.OBJECT_MAGIC),
        "link": (layout.LINK, layout.LINK_MAGIC),
        "regions": (layout.REGIONS, layout.REGIONS_MAGIC),
        "seal": (journal.SEAL, journal.SEAL_MAGIC),
        "base": (journal.BASE, journal.BASE_MAGIC),
    }


def _first(machine: "Machine", ram: "Ram", what: str) -> int:
    """Return the first page of a kind that the super block leads to."""
    pfn = _super_pfn(machine)
    for step, field in _way(what):
        record, _ = _records()[step]
        following = _pfn_in(getattr(record.read(ram.peek(pfn)), field))
        if not following:
            raise MachineError(f"there is no {what}: {field} of the {step} at pfn {format_pfn(pfn)} is 0")
        pfn = following
    return pfn


def _way(what: str) -> list[tuple[str, str]]:
    """Return the fields that lead from the super block to a kind of page."""
    node = [("superblock", "node")]
    return {
        "superblock": [],
        "regions": [("superblock", "regions")],
        "node": node,
        "pagetable": [*node, ("node", "table")],
        "object": [*node, ("node", "object")],
        "link": [*node, ("node", "object"), ("object", "bytes_head")],
        "seal": [*node, ("node", "log")],
        "base": [*node, ("node", "log"), ("seal", "base")],
    }[what]


def _pfn_in(word: int) -> int:
    """Return the pfn of a word, published (with a check above it) or plain."""
    return word & ((1 << 40) - 1)


def _super_pfn(machine: "Machine") -> int:
    """Return the pfn of the super block: the running kernel's, a dead kernel's, or that of an unfinished boot."""
    from pkramfs.kernel import cmdline, nvram

    running = daemons.attached(machine)
    if running is not None:
        dead = running.info.report.get("dead") or {}
        return int(dead.get("super_pfn") or running.store.root())
    pending = nvram.pending(machine)
    pfn = cmdline.pkram_pfn(pending.cmdline) if pending else None
    if pfn is None:
        raise MachineError("no kernel is running, so the super block cannot be found: give a PFN")
    return pfn


def _record(ram: "Ram", pfn: int, what: str) -> dict[str, Any]:
    """Return a metadata page as plain data: fields, entries, problems."""
    record, magic = _records()[what]
    page = ram.peek(pfn)
    values = record.read(page)
    problems = [] if values.magic == magic else [f"magic is {_letters(values.magic)}, expected {_letters(magic)}"]
    problems += _checksum_problem(ram, pfn, values.checksum)
    fields = []
    for offset, size, name, meaning in record.table():
        shown, problem = _value(pfn, offset, name, getattr(values, name), meaning)
        fields.append({"offset": offset, "size": size, "name": name, "value": shown, "meaning": meaning})
        problems += [problem] if problem else []
    entries = _entries(what, page, values)
    return {"record": record.name, "pfn": pfn, "fields": fields, "entries": entries, "problems": problems}


def _checksum_problem(ram: "Ram", pfn: int, found: int) -> list[str]:
    from pkramfs.pkram.page import checksum

    if not ram.data_spans(pfn, pfn + 1):
        return ["the page was never written"]
    expected = checksum(ram, pfn)
    return [] if found == expected else [f"checksum is {found:016x}, expected {expected:016x}"]


def _value(pfn: int, offset: int, name: str, value: Any, meaning: str) -> tuple[Any, str]:
    """Return a field's value for people, and its problem, if any."""
    if name == "magic":
        return _letters(value), ""
    if isinstance(value, bytes):
        return exact(value.rstrip(b"\0")), ""
    if meaning.startswith(("published", "sealed")):
        return _published(pfn, offset, name, value)
    if "checksum" in name or name == "tree_id":
        return f"{value:016x}", ""
    return value, ""


def _published(pfn: int, offset: int, name: str, word: int) -> tuple[str, str]:
    from pkramfs.pkram.page import unseal

    try:
        return f"pfn {format_pfn(unseal(word, (pfn << PAGE_SHIFT) + offset, '', name))}", ""
    except FormatError:
        return f"{word:#018x}", f"{name} is {word:#018x}, whose check is wrong"


def _letters(magic: int) -> str:
    raw: bytes = magic.to_bytes(8, "little")
    return raw.decode("ascii") if raw.isalnum() else f"{magic:#018x}"


def _entries(what: str, page: bytes, values: Any) -> list[dict[str, Any]]:
    """Return the entries behind the header of a link or of a page of regions."""
    if what == "link":
        return list(_link_entries(page, values))
    if what == "regions":
        return list(_region_entries(page, values))
    return []


def _link_entries(page: bytes, values: Any) -> Iterator[dict[str, Any]]:
    from pkramfs.pkram import format as layout

    index = values.index
    for at in range(min(values.count, layout.LINK_CAPACITY)):
        start = layout.LINK.size + 8 * at
        word = int.from_bytes(page[start : start + 8], "little")
        order = word & layout.ENTRY_ORDER_MASK
        flags = word >> layout.ENTRY_FLAGS_SHIFT & layout.ENTRY_FLAGS_MASK
        yield {"index": index, "pfn": word >> layout.ENTRY_PFN_SHIFT, "order": order, "flags": flags}
        index += 1 << order


def _region_entries(page: bytes, values: Any) -> Iterator[dict[str, Any]]:
    from pkramfs.pkram import format as layout

    for at in range(min(values.count, layout.REGIONS_CAPACITY)):
        region = layout.REGION.read(page, layout.REGIONS.size + at * layout.REGION.size)
        yield {"base": region.base, "size": region.size, "pages": region.size // PAGE_SIZE}


def _page_table(ram: "Ram", pfn: int) -> dict[str, Any]:
    """Return the entries of a page of a page table that are not empty. Such a page has no header."""
    from pkramfs.pkram import format as layout

    page = ram.peek(pfn)
    entries = []
    for at in range(0, PAGE_SIZE, 8):
        word = int.from_bytes(page[at : at + 8], "little")
        if word:
            full, slot = bool(word & layout.TABLE_FULL), word & layout.TABLE_SLOT_MASK
            entries.append({"entry": at // 8, "pfn": word >> 12, "full": full, "slot": slot})
    problems = [
        f"entry {entry['entry']} points to pfn {entry['pfn']:x}, which is outside of RAM"
        for entry in entries
        if entry["pfn"] >= ram.pages
    ]
    return {"record": "PageTable", "pfn": pfn, "fields": [], "entries": entries, "problems": problems}


def _show(found: dict[str, Any]) -> None:
    render.heading(f"{found['record']} at pfn {format_pfn(found['pfn'])}")
    if found["fields"]:
        columns = [Column("OFFSET", figures=True), Column("FIELD"), Column("VALUE"), Column("MEANING")]
        render.table(columns, [(f["offset"], f["name"], _shown(f), f["meaning"]) for f in found["fields"]])
    if found["entries"]:
        render.say()
        names = list(found["entries"][0])
        rows = [[_figure(name, entry[name]) for name in names] for entry in found["entries"]]
        render.table([Column(name.upper(), figures=True) for name in names], rows)
    for problem in found["problems"]:
        render.say(f"problem: {problem}")


def _shown(field: dict[str, Any]) -> Any:
    """Return a field's value as PFN takes it, if it is one."""
    return f"pfn {format_pfn(field['value'])}" if field["meaning"].startswith("pfn of") else field["value"]


def _figure(name: str, value: Any) -> str:
    if name == "pfn":
        return format_pfn(value)
    return f"{value:#x}" if name in ("base", "size") else str(value)


def act_format(args: argparse.Namespace) -> None:
    """Run `pkramctl format`."""
    if arguments.wants_json(args):
        render.emit_json([{"record": r.name, "size": r.size, "fields": r.table()} for r in _declared()])
    else:
        for line in format_tables().split("\n"):
            render.say(line)


def _declared() -> "list[Record]":
    from pkramfs.journal.layout import BASE, SEAL, SEGMENT
    from pkramfs.machine.header import HEADER
    from pkramfs.pkram.format import RECORDS
    from pkramfs.pkram.treeformat import TREE

    return [*RECORDS, SEAL, BASE, SEGMENT, HEADER, TREE]


def format_tables() -> str:
    """Return the records of pkramfs-format(5), in Markdown."""
    from pkramfs.pkram.treeformat import BLOBS, SECTIONS

    parts = []
    for record in _declared():
        lines = [f"| {at} | {size} | {name} | {meaning} |" for at, size, name, meaning in record.table()]
        parts.append("\n".join([f"### {record.name}, {record.size} bytes", "", record.meaning, "", *_FIELDS, *lines]))
    for section in SECTIONS:
        lines = [f"| {column.name} | {column.code} | {column.meaning} |" for column in section.columns]
        title = f"### Tree columns: {section.name}, {section.width} bytes a row"
        parts.append("\n".join([title, "", *_COLUMNS, *lines]))
    parts.append(f"After the columns follow the blobs: {', '.join(BLOBS)}.")
    return "\n\n".join(parts)


_FIELDS = ("| offset | size | field | meaning |", "|---|---|---|---|")
_COLUMNS = ("| column | type | meaning |", "|---|---|---|")
