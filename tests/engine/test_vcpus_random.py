"""Random programs of several processors: a batch against single operations, and two in turn against the oracle."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import FETCH, INVLPG, READ, WRITE, P, U, W
from samples import sampled, sampled_examples
from several_vcpus import ops, pair
from tlb_machine import (
    DATA_A,
    DESIGNS,
    DIRECT,
    LARGE,
    MIB,
    MODES,
    X,
    Y,
    Z,
)
from tlb_programs import MODES as PROGRAM_MODES
from tlb_programs import NUMBERS, TLBS, Together

import shadowcore as sc
from shadowcore.config import MARKERS

# -- a batch is the same as one by one -------------------------------------------------------------------


@pytest.mark.parametrize("mmu", DESIGNS)
@pytest.mark.parametrize("mode", MODES)
def test_batch_is_the_same_as_single_operations(mmu, mode):
    """One array with a vcpu in each row, and the same operations vcpu by vcpu: results, counters, memory."""
    rng = random.Random(11)
    rows = []
    for _ in range(400):
        vcpu, op = rng.randrange(3), rng.choice([READ, READ, WRITE, FETCH, INVLPG])
        base = rng.choice([X, Y, Z, LARGE, DIRECT + 6 * MIB + rng.randrange(8) * 4096])
        rows.append((vcpu, op, base + 8 * rng.randrange(4, 512), rng.choice([0, DATA_A | P | W | U])))

    def run(by_one):
        vm, _, cpus = pair(mmu, mode, vcpus=3)
        if by_one:
            results = [cpus[row[0]].run(ops(row)[list(sc.OP_DTYPE.names)]) for row in rows]
        else:
            results = [cpus[0].run(ops(*rows))]
        names = ("outcome", "error_code", "gpa", "value", "exits", "emulated")
        columns = [np.concatenate([getattr(r, name) for r in results]).tolist() for name in names]
        return columns, vm.stats.as_dict(), vm.memory.bytes.tobytes(), [cpu.tlb.tolist() for cpu in cpus]

    assert run(True) == run(False)


# -- random programs of two ------------------------------------------------------------------------------

# Pairs of modes in one memory.  (A table of 4-byte entries read as one of 8-byte entries is not much of a table, but
# it is one.)
PAIRS = [("64", "64"), ("pae", "pae"), ("32", "32"), ("64", "pae"), ("64", "32"), ("32", "pae")]

EXACT = {
    "native": "native",
    "cached": sc.Shadow.cached(pool_pages=40),
    "cached, 12 pages": sc.Shadow.cached(pool_pages=12),
    "cached, every store zaps": sc.Shadow.cached(pool_pages=40, flood_threshold=1),
}


def interleaved(modes, design, tlb, program, **habits):
    """A program of numbers, the lowest bit of each of which says whose step it is."""
    together = Together([PROGRAM_MODES[mode] for mode in modes], design, tlb, **habits)
    for number in program:
        together.step(number >> 1, number & 1)
    together.finish()
    return together


def seeded(first, count, steps=50):
    for seed in range(first, first + count):
        rng = random.Random(seed)
        yield rng, [rng.getrandbits(48) for _ in range(steps)]


@sampled("number", 60)
@pytest.mark.parametrize("design", EXACT)
@pytest.mark.parametrize("modes", PAIRS)
def test_interleaved_without_a_tlb(modes, design, number):
    """Two vcpus in turn, each against an oracle that walks the tables at each access, over one memory."""
    for _, program in seeded(0, number):
        interleaved(modes, EXACT[design], None, program, holds=False)


@sampled_examples(share=6)
@pytest.mark.parametrize("modes", PAIRS)
def test_interleaved_programs(modes, examples):
    """The same, searched for."""

    @settings(max_examples=examples)
    @given(st.sampled_from(sorted(EXACT)), st.lists(NUMBERS, max_size=50))
    def run(design, program):
        interleaved(modes, EXACT[design], None, program, holds=False)

    run()


@sampled("number", 60)
@pytest.mark.parametrize("mmu", DESIGNS)
@pytest.mark.parametrize("modes", PAIRS)
def test_interleaved_with_tlbs(modes, mmu, number):
    """Each vcpu with a TLB of its own, against what the architecture lets each remember; an invalidation by one does
    nothing for the other."""
    design = {"cached": sc.Shadow.cached(pool_pages=40), "flush": sc.Shadow.flush(quirks=0)}.get(mmu, mmu)
    for rng, program in seeded(500, number):
        interleaved(modes, design, rng.choice(TLBS), program, ahead=mmu in ("unsync", "adaptive"))


def lagging(rng):
    """Settings of `unsync`."""
    least = rng.choice([0, 5])
    return sc.Shadow.unsync(
        pool_pages=rng.choice([8, 10, 12, 16, 40, 64]),
        min_free=least,
        refill=max(least, rng.choice([0, 5, 25])),
        prev_roots=rng.choice([0, 1, 3, 16]),
        prefetch=rng.choice([0, 1, 2, 8, 32]),
        flood_threshold=rng.choice([None, 1, 3, 255]),
        release=rng.choice(["6.1", "6.12", "2.6.28"]),
        notpresent_marker=rng.choice(MARKERS),
    )


@sampled("number", 200)
@pytest.mark.parametrize("modes", PAIRS)
def test_interleaved_with_lagging_tables(modes, number):
    """Under `unsync` with any settings, with a TLB and without: what one processor changes and invalidates, another may
    remember until it invalidates itself."""
    met = 0
    for rng, program in seeded(2000, number):
        design = lagging(rng)
        met += interleaved(modes, design, rng.choice([None, *TLBS]), program, ahead=True).by_memory
    assert met


def test_interleaved_programs_do_something():
    """Both vcpus succeed in most of their accesses, and edit tables that the other uses."""
    outcomes = []
    for _, program in seeded(0, 10):
        vm = interleaved(("64", "pae"), EXACT["cached"], None, program, holds=False).vm
        outcomes.append((vm.stats.accesses, vm.stats.pf_guest, vm.stats.pf_emulate, vm.stats.remote_tlb_flush))
    accesses, faults, emulated, remote = np.sum(outcomes, axis=0)
    assert faults < accesses / 3
    assert emulated > accesses / 20
    assert remote > accesses / 20
