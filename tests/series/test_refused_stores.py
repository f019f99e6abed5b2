"""`can_emulate` says no, of stores that are emulated for another reason than a table, of one page and of two.

CR0.WP is clear, and SMEP, SMAP or protection keys are on: then no shadow leaf can grant a supervisor's store to a
read-only page, and nothing can be unprotected so that it might.
"""

import ctypes

import pytest
from guest2007 import every_mode
from page_stores import PAGE, STATES, STORES, Guest

import shadowcore as sc

CONFINED = [state for state in STATES if state != "leaves"]


def refusing(mode, kinds, state, answer=False):
    """A guest, and what its callback was asked."""
    guest = Guest(mode, "cached", kinds, state)
    asked = []

    def can_emulate(gva, gpa, nbytes):
        asked.append((gva, gpa, nbytes))
        return answer(gpa) if callable(answer) else answer

    guest.vm.mmu.can_emulate = can_emulate
    return guest, asked


def confined(mode, state):
    return not (state == "PKE" and mode in ("32", "pae"))


@pytest.mark.parametrize("name", ["write", "add", "cmpxchg", "batch", "no data"])
@pytest.mark.parametrize("state", CONFINED)
@every_mode
def test_store_that_no_leaf_can_grant(mode, state, name):
    """Asked once; the error says why, and nothing was stored; one page or two."""
    if not confined(mode, state):
        return
    for left, size in ((0, 8), (8, 8), (4, 8), (1, 2)):
        guest, asked = refusing(mode, ("read-only", "read-only"), state)
        before = guest.memory.words.copy()
        for _ in range(2):
            with pytest.raises(sc.EngineError, match="no shadow leaf can grant"):
                STORES[name](guest, guest.at(size, left), size)
        page = 0 if left else 1
        offset = (PAGE - left) % PAGE
        assert asked == [(guest.va[1] - left, guest.gfn[page] * PAGE + offset, left or size)] * 2
        assert (guest.memory.words == before).all()
        assert guest.vm.stats.pf_emulate == 0
        assert guest.log() == []
        assert guest.vm.audit().ok
        guest.vm.mmu.can_emulate = None
        STORES[name](guest, guest.at(size, left), size)
        assert guest.vm.stats.pf_emulate == 1 + (0 < left < size)


@pytest.mark.parametrize("state", CONFINED)
@every_mode
def test_store_that_is_granted_to_one_page_and_not_to_the_other(mode, state):
    """Both are asked for, each with its bytes; refused where no leaf helps, the store is not made at all."""
    if not confined(mode, state):
        return
    for kinds in (("table", "read-only"), ("read-only", "table"), ("writable", "read-only"), ("read-only", "writable")):
        guest, asked = refusing(mode, kinds, state, lambda gpa: True)
        guest.cpu.write(guest.va[1] - 3, 0, 8)
        want = [(guest.va[1] - 3, guest.gfn[0] * PAGE + PAGE - 3, 3), (guest.va[1], guest.gfn[1] * PAGE, 5)]
        assert asked == [ask for ask, kind in zip(want, kinds, strict=True) if kind != "writable"]
        assert set(guest.log()) >= set(guest.gfn)

        guest, asked = refusing(mode, kinds, state)
        before = guest.memory.words.copy()
        with pytest.raises(sc.EngineError, match="no shadow leaf can grant"):
            guest.cpu.write(guest.va[1] - 3, 0x1122334455667788, 8)
        assert (guest.memory.words == before).all()
        assert len(set(asked)) == 2 - ("writable" in kinds) or kinds[0] == "read-only"
        assert guest.vm.audit().ok


@every_mode
def test_read_only_table(mode):
    """A page that is a table, and that no leaf could grant either: unprotecting it does not help, and the error is that
    of a page no leaf can grant."""
    for left, size in ((0, 8), (8, 8), (4, 8)):
        guest, asked = refusing(mode, ("read-only table", "read-only table"), "SMEP")
        before = guest.memory.words.copy()
        with pytest.raises(sc.EngineError, match="no shadow leaf can grant"):
            guest.cpu.write(guest.at(size, left), 0x1122334455667788, size)
        assert (guest.memory.words == before).all()
        assert asked
        assert guest.vm.audit().ok


def test_c_says_the_same():
    from capi import API, Access, C, Outcome, error, made

    guest, _ = refusing("64", ("read-only", "read-only"), "SMEP")
    handle = sc.embed.handle(guest.vm)
    try:
        access = made(Access, gva=guest.va[0], kind=C["SC_WRITE"], size=8, flags=C["SC_DATA"])
        assert API.access(handle, access, ctypes.byref(made(Outcome))) == C["SC_E_ENGINE"]
        assert "no shadow leaf can grant" in error()
    finally:
        sc.embed.release(handle)
