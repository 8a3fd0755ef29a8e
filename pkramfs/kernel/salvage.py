# SPDX-License-Identifier: GPL-2.0-or-later
"""A forced kexec over metadata that are damaged in part: whole nodes cross, the rest is named and given up.

    list      a ──✗   b ──▶ c         search finds b and c by their own pages (pkram/rescue.py)
    kexec     a ──▶ b ──▶ c           unless one of them cannot be read itself

The work of `pkramctl free --damaged`, in the plan of a kexec: finding changes nothing, and the list is mended
as the plan's first step.
"""

from dataclasses import dataclass

from pkramfs.errors import FormatError
from pkramfs.kernel import incoming
from pkramfs.kernel.incoming import IncomingNode
from pkramfs.kernel.nvram import NodePages
from pkramfs.kernel.running import Running
from pkramfs.kernel.steps import Operation
from pkramfs.pkram.rescue import Survey
from pkramfs.text import exact
from pkramfs.units import format_pfn, plural


@dataclass
class Salvage:
    """The intact nodes, the faults of the list, and the losses."""

    nodes: list[IncomingNode]
    problems: list[FormatError]
    lost: list[NodePages]


def look(kernel: Running) -> Salvage:
    """Find the nodes that a forced kexec can hand over."""
    survey = kernel.survey()
    found = Salvage([], list(survey.problems), [])
    for error in survey.damaged:
        found.lost.append((f"a node at pfn {format_pfn(error.pfn or 0)}, which cannot be read,", 0))
    for node in survey.nodes:
        try:
            found.nodes.append(incoming.described(kernel.ram, node))
        except FormatError as error:
            found.problems.append(error)
            found.lost.append((f"node {exact(node.name)}", node.pages))
    return found


@dataclass
class MendList(Operation):
    """The list names whole nodes, and no others."""

    kernel: Running
    nodes: list[IncomingNode]

    def describe(self) -> str:
        return f"mend the list of nodes: {plural(len(self.nodes), 'node')} can be read"

    def execute(self) -> None:
        whole, store = {node.pfn for node in self.nodes}, self.kernel.store
        self.kernel.mend(self._tell)
        for node in store.nodes():
            if node.pfn not in whole:
                store.withdraw(node.name)

    def _tell(self, survey: Survey) -> None:
        for error in survey.problems:
            self.kernel.machine.log(f"pkram: {error}")
