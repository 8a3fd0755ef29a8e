# SPDX-License-Identifier: GPL-2.0-or-later
"""One generation after another, with random trees, images, command lines and deaths."""

import random
from typing import Any

import pytest

from pkramfs.kernel import boot, kernelrecord

STEPS = [step.__name__ for step in boot.STEPS]
OPTIONS = ["ro", "ro quiet", "nokaslr", "ro crashkernel=8M", "ro scratch=80M"]


def live(lab: Any, generations: int, seed: int) -> None:
    """Live through kernels that free some trees, make some, and die; each boot may be killed once."""
    chance = random.Random(seed)
    names: set[str] = set()
    for generation in range(generations):
        kernel = lab.up()
        for name in sorted(names):
            assert lab.intact(name), f"{name} in generation {generation}, seed {seed}"
            if chance.random() < 0.3:
                kernel.store.withdraw(name.encode())
                names.discard(name)
        kernel.sweep()
        for number in range(chance.randrange(3)):
            name = f"tree{generation}-{number}"
            lab.preserve(name, chance.randrange(1, 6000), seed=chance.randrange(1 << 30))
            names.add(name)
        _next(lab, chance)
        assert {n.name.decode() for n in lab.up().store.nodes()} == names
        assert_nothing_leaked(lab)


def _next(lab: Any, chance: random.Random) -> None:
    lab.load(f"builtin:{chance.randrange(1, 24)}M", chance.choice(OPTIONS))
    poison = chance.random() < 0.5
    if chance.random() < 0.5:
        with lab.dies(chance.choice(STEPS)):
            lab.execute(poison=poison)
    else:
        lab.execute(poison=poison)
    assert kernelrecord.read(lab.machine) is None or lab.up()


def assert_nothing_leaked(lab: Any) -> None:
    """Assert that every block is free, or has an owner who needs it."""
    kernel = lab.up()
    counts = kernel.leases.counts()
    trees = kernel.store.preserved().outward(512).total
    own = (kernel.info.own_pages - kernel.info.reserve_pages).outward(512).total
    assert counts["tree"] == trees
    assert counts["reserve"] == len(kernel.info.reserve_blocks)
    assert counts["kernel"] <= own
    free = counts["free"] + counts["kernel"] + counts["reserve"] + counts["tree"] + counts["hole"]
    assert free == kernel.info.blocks


@pytest.mark.few(1)
@pytest.mark.parametrize("seed", range(3))
def test_generations(lab: Any, seed: int) -> None:
    live(lab, 8, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 104))
def test_fifty_generations(lab: Any, seed: int) -> None:
    live(lab, 50, seed)
