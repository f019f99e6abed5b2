"""The shadow as an embedder sees it: roots, pool, ranges of flushes. A walker and a cache of one's own."""

import ctypes

import numpy as np
import pytest
from capi import API, DATA, DESIGNS, EVENT, OK, TABLES, C, Guest, Pool, Root, ShadowPage, made

import shadowcore as sc

NOWHERE = 2**64 - 1
ADDRESS = 0xF_FFFF_FFFF_F000
SHADOWS = [name for name in DESIGNS if name != "native"]


def pool_of(guest):
    pool = made(Pool)
    assert API.shadow_pool(guest.vm, pool) == OK
    return pool


def walk(guest, address, vcpu=0):
    """Where the tables lead from the root, or None: over the memory that the library names, by x86's rules alone."""
    root, pool = made(Root), pool_of(guest)
    assert API.shadow_root(guest.vm, vcpu, root) == OK
    tables = np.ctypeslib.as_array((ctypes.c_uint64 * (pool.pages * 512)).from_address(pool.tables))
    level, table = (2, root.pdpte[address >> 30 & 3]) if root.mode == 3 else (root.mode, root.hpa)
    while table != NOWHERE:
        entry = int(tables[(table - pool.tables_hpa) // 8 + (address >> 12 + 9 * (level - 1) & 511)])
        if not entry & 1:
            return None
        mask = (1 << 12 + 9 * (level - 1)) - 1
        if level == 1 or entry & 0x80:
            return entry & ADDRESS & ~mask | address & mask
        table, level = entry & ADDRESS, level - 1
    return None


@pytest.mark.parametrize("mode", ["32", "pae", "64", "la57"])
@pytest.mark.parametrize("design", SHADOWS)
def test_a_walker_of_ones_own(design, mode):
    """After each access the tables lead where it led; RAM lies where the library says."""
    guest = Guest(design, mode)
    pool = pool_of(guest)
    assert pool.ram == guest.memory.ctypes.data
    assert pool.ram_size == guest.memory.size
    nested = guest.twin.mmu.design.engine == "nested"
    random = np.random.default_rng(3)
    for _ in range(200):
        gva = DATA + int(random.integers(0, 256)) * 4096 + 8 * int(random.integers(0, 512))
        rc, outcome = guest.access(int(random.integers(0, 2)), gva)
        assert rc == OK
        assert walk(guest, outcome.gpa if nested else gva) == outcome.hpa
        assert outcome.hpa - pool.ram_hpa + pool.ram == outcome.host
    vm = sc.embed.from_handle(guest.vm.value)
    told = {}
    for number in range(pool.pages):
        page = made(ShadowPage)
        assert API.shadow_page(guest.vm, number, page) == OK
        assert page.hpa == pool.tables_hpa + 4096 * number
        if page.active:
            told[number] = page
    assert pool_of(guest).active == len(told) == len(vm.mmu.pages)
    for of in vm.mmu.pages:
        page = told[int(of["page"])]
        assert (page.gfn, page.level, page.direct) == (of["gfn"], of["level"], of["direct"])
        assert (page.guest_mode, page.quadrant, page.rights) == (of["glevels"], of["quadrant"], of["access"])
        assert (page.root_count, page.unsync) == (of["root_count"], of["unsync"])
    guest.close()


def test_no_tables():
    guest = Guest("native")
    pool = pool_of(guest)
    assert (pool.pages, pool.active, pool.tables) == (0, 0, None)
    assert pool.ram == guest.memory.ctypes.data
    assert API.shadow_root(guest.vm, 0, made(Root)) == C["SC_E_ARGUMENT"]
    assert API.shadow_page(guest.vm, 0, made(ShadowPage)) == C["SC_E_ARGUMENT"]
    guest.close()


def test_misuse(guest):
    assert API.shadow_root(guest.vm, 1, made(Root)) == C["SC_E_ARGUMENT"]
    assert API.shadow_page(guest.vm, 1 << 30, made(ShadowPage)) == C["SC_E_ARGUMENT"]
    null = C["SC_E_NULL"]
    assert API.shadow_root(guest.vm, 0, None) == API.shadow_page(guest.vm, 0, None) == null
    assert API.shadow_pool(guest.vm, None) == null
    for call, of in (
        (lambda s: API.shadow_root(guest.vm, 0, s), Root),
        (lambda s: API.shadow_pool(guest.vm, s), Pool),
        (lambda s: API.shadow_page(guest.vm, 0, s), ShadowPage),
    ):
        wrong = made(of)
        wrong.struct_size += 8
        assert call(wrong) == C["SC_E_STRUCT"]
    gone = ctypes.c_uint64(7)
    assert API.shadow_root(gone, 0, made(Root)) == API.shadow_page(gone, 0, made(ShadowPage)) == C["SC_E_HANDLE"]
    assert API.shadow_pool(gone, made(Pool)) == C["SC_E_HANDLE"]


@pytest.mark.parametrize("pool_pages", [12, 256])
@pytest.mark.parametrize("design", SHADOWS)
def test_a_cache_of_ones_own(design, pool_pages):
    """An embedder that keeps what accesses came to, drops what flushes name, and at INVLPG the page, is never wrong: an
    access that hits there is one that the library lets through without an exit."""
    guest, cache, flushes = Guest(design, pool_pages=pool_pages), {}, []
    vm = sc.embed.from_handle(guest.vm.value)

    @EVENT
    def on_event(_context, event):
        first, frames = event.contents.address, event.contents.frames
        flushes.append(frames)
        for page, (gpa, _) in list(cache.items()):
            if not frames or first <= gpa >> 12 < first + frames:
                del cache[page]

    assert API.on_event(guest.vm, 1 << C["SC_EVENT_FLUSH"], on_event, None) == OK
    random = np.random.default_rng(11)
    hits = 0
    leaves = guest.tables.entry(DATA, 1).gpa
    for step in range(1500):
        what = int(random.integers(0, 10))
        number = int(random.integers(0, 24))
        gva = DATA + number * 4096
        if what == 0:  # the guest edits an entry of its table, and tells the processor
            entry = leaves + 8 * number
            target = 0x20_0000 + 4096 * int(random.integers(0, 40))
            value = target | int(random.choice([0, 5, 7, 7]))
            rc, _ = guest.access(C["SC_WRITE"], TABLES + entry - 16 * 4096, value=value)
            assert rc == OK
            assert API.invlpg(guest.vm, 0, gva) == OK
            cache.pop(number, None)
        elif what == 1 and step % 7 == 0:
            assert API.host_unmap(guest.vm, 0x200 + int(random.integers(0, 40)), 1, 0) == OK
        else:
            write = int(random.integers(0, 2))
            known = cache.get(number)
            exits = vm.stats.exits
            rc, outcome = guest.access(C["SC_WRITE"] if write else C["SC_READ"], gva, user=1)
            if known is not None and (not write or known[1]):
                hits += 1
                assert (rc, outcome.gpa >> 12, outcome.emulated) == (OK, known[0] >> 12, 0)
                assert vm.stats.exits == exits
            cache.pop(number, None)
            if rc == OK and not outcome.emulated:
                cache[number] = (outcome.gpa, bool(write))
    assert hits > 100
    assert flushes
    if pool_pages == 256 and guest.twin.mmu.design.engine != "nested":
        assert any(flushes)
    assert vm.audit().ok
    guest.close()
