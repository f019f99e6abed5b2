"""CR0.WP = 0: a leaf that is W and not U may serve a supervisor's store to a read-only page only where nothing looks at
whether the page is a user page (`roots.wp0_leaves`).

SMEP, SMAP and protection keys look. The guest is compared with `native`, which walks its tables each time.
"""

import numpy as np
import pytest
from guest2007 import MODES, USER, Guest

import shadowcore as sc

CR0_WP, CR4_SMEP, CR4_SMAP, CR4_PKE = 1 << 16, 1 << 20, 1 << 21, 1 << 22
CLOSED = 1 << 2  # PKRU: no access by key 1

LOOKS = {
    # bit of CR4, mode: what would be let through by such a leaf; error code of the guest's own tables
    "SMEP": (CR4_SMEP, lambda cpu: cpu.fetch(USER), 0x11),
    "SMAP": (CR4_SMAP, lambda cpu: cpu.read(USER), 0x01),
    "SMAP, store": (CR4_SMAP, lambda cpu: cpu.write(USER, 2), 0x03),
    "PKE": (CR4_PKE, lambda cpu: cpu.read(USER), 0x21),
    "PKE, store": (CR4_PKE, lambda cpu: cpu.write(USER, 2), 0x23),
}
CASES = [(mode, what) for mode in MODES for what in LOOKS if not (what[:3] == "PKE" and mode in ("32", "pae"))]


def guest_of(mode, design, size, dirty=True):
    guest = Guest(mode, design, pages=0)
    large = 1 << guest.tables.format.shift(2) if size == "large" else 4096
    pkey = 1 if mode in ("64", "la57") else 0
    gpa = 0 if size == "large" else 0x100000
    guest.map(USER, gpa, large, rights="rxu", page_size=large, pkey=pkey, dirty=dirty)
    guest.cpu.cr3 = guest.cpu.cr3
    guest.cpu.cr0 &= ~CR0_WP
    return guest


def store(guest, batch):
    if not batch:
        guest.cpu.write(USER, 1)
        return
    ops = np.zeros(3, sc.OP_DTYPE)
    ops["op"], ops["size"], ops["addr"], ops["value"] = sc.Op.WRITE, 8, USER, 1
    assert not guest.cpu.run(ops).outcome.any()


def forbid(guest):
    """What the store was allowed by goes: EFLAGS.AC, the open key."""
    guest.cpu.ac = False
    if guest.cpu.cr4 & CR4_PKE:
        guest.cpu.pkru = CLOSED


@pytest.mark.parametrize("batch", [False, True], ids=["call", "batch"])
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("design", ["cached", sc.Shadow.flush(quirks=0), "unsync"], ids=["cached", "flush", "unsync"])
@pytest.mark.parametrize(("mode", "what"), CASES)
def test_store_then_an_access_that_is_looked_at(mode, what, design, size, batch):
    """The store passes; what it left behind does not let through what the tables refuse. Turned on before the store, or
    after it, and there and back."""
    bit, access, code = LOOKS[what]
    for order in ("before", "after", "there and back"):
        guest = guest_of(mode, design, size)
        guest.cpu.ac = True
        if order != "after":
            guest.cpu.cr4 |= bit
        store(guest, batch)
        if order == "there and back":
            guest.cpu.cr4 &= ~bit
            store(guest, batch)
        guest.cpu.cr4 |= bit
        forbid(guest)
        for _ in range(2):
            with pytest.raises(sc.PageFault) as fault:
                access(guest.cpu)
            assert fault.value.error_code == code, order
        assert guest.vm.audit().ok
        guest.cpu.cr4 &= ~bit
        guest.cpu.fetch(USER)
        guest.cpu.write(USER, 3)
        assert guest.cpu.read(USER) == 3


@pytest.mark.parametrize(("mode", "what"), CASES)
def test_leaf_of_such_a_store(mode, what):
    """W without U where nothing looks; where something does, no W at all, and each store is emulated."""
    bit, _, _ = LOOKS[what]
    guest = guest_of(mode, "cached", "small")
    guest.cpu.ac = True
    store(guest, False)
    assert guest.rights(USER) == "rw"
    assert guest.vm.stats.pf_emulate == 0
    guest.cpu.cr4 |= bit
    for number in range(1, 4):
        store(guest, False)
        assert "w" not in guest.rights(USER)
        assert guest.vm.stats.pf_emulate == number
    assert not guest.vm.mmu.pages["wp0"][guest.vm.mmu.pages["page"] == guest.vm.mmu.roots()[0]].any()
