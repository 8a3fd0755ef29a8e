# SPDX-License-Identifier: GPL-2.0-or-later
"""A plan: operations that are described first, then done in order, and undone if a later one fails in time.

    describe()    every operation, for people     what a dry run prints
    execute()     one after the other ─── one fails before the final one ──▶ undo(), the last one first

Kernel: kernel/kexec_core.c (kernel_kexec), which unwinds with gotos
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pkramfs.errors import PkramfsError

log = logging.getLogger(__name__)


class Operation(ABC):
    """One step of a plan."""

    final = False
    """True if nothing can be undone once this has begun."""

    @abstractmethod
    def describe(self) -> str:
        """Describe the step in one line."""

    def details(self) -> list[str]:
        """Describe the parts of the step, one line for each."""
        return []

    def lines(self) -> list[str]:
        """Return the step for people, its details indented."""
        return [self.describe(), *(f"  {detail}" for detail in self.details())]

    @abstractmethod
    def execute(self) -> None:
        """Do the step."""

    def undo(self) -> None:  # noqa: B027 - most steps leave nothing to undo
        """Take back what `execute` did or began, after a later step failed before the point of no return."""


@dataclass
class Plan:
    """All that `-e` will do. `problems` are the reasons not to; `execute` raises the first of them."""

    problems: list[PkramfsError]
    warnings: list[str]
    relocations: list[str]
    """Pages that lie, or lay, where the loaded kernel will be copied, and their owners."""
    operations: list[Operation]
    pause: float
    """Predicted seconds from the first freeze to the running kernel."""
    copying: float
    """Of these, for copying segments into RAM and summing them."""
    foreseen: dict[str, Any]
    """The figures that the report of the boot compares with what was seen (history.py)."""

    def describe(self) -> list[str]:
        """Describe the plan for people, one line for each fact."""
        return [
            *(f"refused: {problem}" for problem in self.problems),
            *(f"warning: {warning}" for warning in self.warnings),
            *self.relocations,
            *(line for operation in self.operations for line in operation.lines()),
            f"predicted pause: {self.pause:.1f} s",
        ]

    def execute(self, before: Callable[[Operation], None] = lambda _: None) -> None:
        """Execute all operations, telling `before` each; undo them if one fails in time.

        The caller holds the machine lock exclusively.
        """
        if self.problems:
            raise self.problems[0]
        begun: list[Operation] = []
        try:
            for operation in self.operations:
                before(operation)
                begun.append(operation)
                operation.execute()
        except BaseException:
            if not any(operation.final for operation in begun):
                _undo(begun)
            raise


def _undo(begun: list[Operation]) -> None:
    """Undo operations, the last one first; go on with the others if one cannot be undone."""
    for operation in reversed(begun):
        try:
            operation.undo()
        except (PkramfsError, OSError):
            log.exception("cannot undo: %s", operation.describe())
