# SPDX-License-Identifier: GPL-2.0-or-later
"""A plan: steps that are described before they are done, and undone if a later one fails in time.

    describe()    every step, for people          what a dry run prints
    execute()     one after the other ─── one fails before the final step ──▶ undo(), the last one first

Kernel: no counterpart; kernel_kexec() unwinds with gotos
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from pkramfs.errors import PkramfsError

log = logging.getLogger(__name__)


class Operation(ABC):
    """One step of a plan."""

    final = False
    """Whether nothing can be undone once it has begun."""

    @abstractmethod
    def describe(self) -> str:
        """The step in one line."""

    def details(self) -> list[str]:
        """What belongs to the step: one line for each piece."""
        return []

    def lines(self) -> list[str]:
        """The step for people, what belongs to it indented."""
        return [self.describe(), *(f"  {detail}" for detail in self.details())]

    @abstractmethod
    def execute(self) -> None:
        """Do it. Whoever dies here leaves what the table above says."""

    def undo(self) -> None:  # noqa: B027 - most steps leave nothing to be undone
        """Take back what `execute` did, or has begun: a later step failed before the point of no return."""


@dataclass
class Plan:
    """What `-e` will do. `problems` are the reasons not to; `execute` raises the first of them."""

    problems: list[PkramfsError]
    warnings: list[str]
    relocations: list[str]
    """Pages that lie, or lay, where the loaded kernel will be copied, and whose."""
    operations: list[Operation]
    pause: float
    """Predicted seconds from the first freeze to the running kernel."""
    copying: float
    """Of these, for copying segments into RAM and summing them."""

    def describe(self) -> list[str]:
        """The plan for people, one line each."""
        return [
            *(f"refused: {problem}" for problem in self.problems),
            *(f"warning: {warning}" for warning in self.warnings),
            *self.relocations,
            *(line for operation in self.operations for line in operation.lines()),
            f"predicted pause: {self.pause:.1f} s",
        ]

    def execute(self, before: Callable[[Operation], None] = lambda _: None) -> None:
        """Do it, telling `before` each operation; undo it, if one fails in time. The caller holds the machine lock
        exclusively."""
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
    """Undo steps, the last one first; one that cannot be undone is no reason to leave the others."""
    for operation in reversed(begun):
        try:
            operation.undo()
        except (PkramfsError, OSError):
            log.exception("cannot be undone: %s", operation.describe())
