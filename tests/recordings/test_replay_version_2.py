"""What version 2 of the format added, in a replay: fetches, sizes, privilege, EFER, INVPCID, marks, processors."""

import numpy as np
import pytest

from shadowcore import trace
from shadowcore.recording.kinds import CPL_KNOWN, INVPCID, LOAD_EFER, MARK

DESIGNS = ("native", "flush", "cached", "unsync")
PG, EFER, NX = 0x80050033, 0xD00, 1 << 63
KNOWN_USER = CPL_KNOWN | 3 << 8 | trace.USER
ROOT, PDPT, PD, PT = 0x1000, 0x2000, 0x3000, 0x4000


def tables():
    """The first pages of the address space: page 5 for user code, 6 not to be executed, 7 for the kernel alone."""
    rows = []
    words = ((4, ROOT, {0: PDPT | 7}), (3, PDPT, {0: PD | 7}), (2, PD, {0: PT | 7}))
    leaves = {5: 0x5000 | 7, 6: 0x6000 | 7 | NX, 7: 0x7000 | 3, 1: ROOT | 3, 4: PT | 3}
    for level, gpa, entries in (*words, (1, PT, leaves)):
        rows.append((trace.TABLE, level | (16 if level == 4 else 0), gpa, 0, 0))
        rows += [(trace.STORE, level | trace.SNAPSHOT, gpa + 8 * n, word, 0) for n, word in sorted(entries.items())]
    return [*rows, (trace.LOAD_CR3, 0, ROOT, 0, 0)]


def second():
    """Processor 1 turns on the same."""
    return [
        (trace.LOAD_CR, 0, 0x60000011, 0x20, 1),
        (trace.LOAD_CR3, 0, ROOT, 0, 1),
        (LOAD_EFER, 0, EFER, 0, 1),
        (trace.LOAD_CR, 0, PG, 0x20, 1),
    ]


def recording(*rows, vcpus=1):
    kind, flags, addr, value, vcpu = (list(column) for column in zip(*tables(), *rows, strict=True))
    return trace.Recording(
        name="test",
        kind=np.array(kind, np.uint8),
        flags=np.array(flags, np.uint16),
        insns=np.ones(len(kind), np.uint32),
        addr=np.array(addr, np.uint64),
        value=np.array(value, np.uint64),
        vcpu=np.array(vcpu, np.uint8),
        vcpus=vcpus,
        cr0=PG,
        cr4=0x20,
        efer=EFER,
        nframes=16,
    )


def replayed(design, *rows, vcpus=1):
    return trace.replay(recording(*rows, vcpus=vcpus), design, audit_every=1)


@pytest.mark.parametrize("design", DESIGNS)
def test_fetches_fetch(design):
    good = (trace.ACCESS, KNOWN_USER | trace.FETCH, 0x5010, 0x5010, 0)
    assert replayed(design, good).faults == 0
    refused = (trace.ACCESS, KNOWN_USER | trace.FETCH, 0x6010, 0x6010, 0)
    assert replayed(design, good, refused).faults == 1
    assert replayed(design, (trace.ACCESS, KNOWN_USER, 0x6010, 0x6010, 0)).faults == 0


@pytest.mark.parametrize("design", DESIGNS)
def test_known_users_are_users(design):
    """From the first record on, and in either half of the address space."""
    refused = (trace.ACCESS, KNOWN_USER, 0x7000, 0x7000, 0)
    assert replayed(design, refused).faults == 1
    assert recording(refused).first_user == len(tables())
    assert replayed(design, (trace.ACCESS, CPL_KNOWN, 0x7000, 0x7000, 0)).faults == 0
    system = (trace.ACCESS, CPL_KNOWN | 3 << 8, 0x7000, 0x7000, 0)  # by code of level 3, as supervisor
    assert replayed(design, system).faults == 0


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("log2", range(7))
def test_sizes_stay_within_the_page(design, log2):
    end = (trace.ACCESS, CPL_KNOWN | (log2 + 1) << 4, 0x5FFF, 0x5FFF, 0)
    result = replayed(design, end, (trace.ACCESS, CPL_KNOWN | (log2 + 1) << 4 | 1, 0x5000, 0x5000, 0))
    assert (result.faults, result.gpa_mismatches) == (0, 0)


@pytest.mark.parametrize("design", DESIGNS)
def test_processors_have_registers_of_their_own(design):
    early = (trace.ACCESS, CPL_KNOWN, 0x8000, 0x8000, 1)  # no paging yet: anything leads to itself
    late = (trace.ACCESS, CPL_KNOWN, 0x5000, 0x5000, 1)
    result = replayed(design, early, *second(), late, (trace.ACCESS, CPL_KNOWN, 0x5000, 0x5000, 0), vcpus=2)
    assert (result.faults, result.gpa_mismatches, result.violations) == (0, 0, ())
    assert replayed(design, *second(), early, vcpus=2).faults == 1


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("start", range(3))
def test_a_start_in_the_middle(design, start):
    rows = (*second(), *[(trace.ACCESS, CPL_KNOWN, 0x5000, 0x5000, 1)] * 3)
    made = recording(*rows, vcpus=2)
    result = trace.replay(made, design, start=made.operations - 1 - start, audit_every=1)
    assert (result.faults, result.gpa_mismatches, result.accesses) == (0, 0, 1 + start)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("kind", range(4))
def test_invpcid_drops_translations(design, kind):
    """A leaf moves, and after INVPCID of each type the new one holds."""
    before = (trace.ACCESS, CPL_KNOWN, 0x5000, 0x5000, 0)
    moved = (trace.STORE, 1, PT + 8 * 5, 0x8000 | 7, 0)
    after = (trace.ACCESS, CPL_KNOWN, 0x5000, 0x8000, 0)
    result = replayed(design, before, moved, (INVPCID, kind, 0x5000, 0, 0), after)
    assert (result.faults, result.gpa_mismatches, result.table_stores) == (0, 0, 1)
    assert replayed(design, (MARK, 0, 3, 0, 0), before).faults == 0


@pytest.mark.parametrize("design", DESIGNS)
def test_a_refused_efer_is_a_fault(design):
    assert replayed(design, (LOAD_EFER, 0, EFER & ~0x100, 0, 0)).faults == 1  # LME may not change under paging
    assert replayed(design, (LOAD_EFER, 0, EFER | 1, 0, 0)).faults == 0
