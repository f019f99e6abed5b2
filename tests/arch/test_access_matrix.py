"""All combinations of entry bits, register bits and kinds of access, against the oracle.

The idea is that of kvm-unit-tests' x86/access.c: orthogonal flags form one counter, combinations that mean
nothing are left out, a failing case is named by its flags.  Each case writes its entries through the
guest's own mapping of its tables (so a shadow MMU has to see the stores), loads the registers that differ
from the previous case's, does INVLPG and the access, and reads the entries back: outcome, error code,
address and every A and D bit count. Nothing else is flushed between cases, so what a case leaves behind
meets the next one.

The default run takes cases at a prime stride; with -m slow all 28,999,680 of them are run.
"""

import itertools

import numpy as np
import oracle
import pytest
import streams
from oracle import (
    CR0,
    CR0_PG,
    CR0_WP,
    CR3,
    CR4,
    CR4_LA57,
    CR4_PAE,
    CR4_PKE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER,
    EFER_LME,
    EFER_NXE,
    FETCH,
    INVLPG,
    NX,
    OK,
    PF_P,
    PF_RSVD,
    PF_W,
    PS,
    READ,
    WRITE,
    A,
    D,
    P,
    U,
    W,
)

import shadowcore as sc

DESIGNS = ["native", "cached"]

# Physical layout (access.c: the page at 32 MiB, its tables behind it) and the linear address under test.
PAGE = 32 << 20
TABLES = 33 << 20
RAM = 40 << 20
ADDRESS = 0xFFFF923400000000
KERNEL_FLAGS = P | W | A | D


class Frames:
    """Guest memory under construction: 8-byte entries by address, and the next free table frame."""

    def __init__(self, first=TABLES):
        self.entries = {}
        self.next = first

    def table(self):
        self.next += 4096
        return self.next - 4096

    def map(self, root, levels, address, leaf, last=1, flags=P | W | U | A):
        """Put `leaf` at level `last` of a linear address, making the tables above with `flags`.  Returns the
        addresses of the entries, root first."""
        base, path = root, []
        for level in range(levels, last - 1, -1):
            where = base + (address >> (12 + 9 * (level - 1)) & 511) * 8
            path.append(where)
            if level == last:
                self.entries[where] = leaf
            elif where not in self.entries:
                self.entries[where] = self.table() | flags
            base = self.entries[where] & oracle.bits(51, 12)
        return path


class Machine:
    """One processor in 64-bit mode over given entries, in the engine or the oracle."""

    def __init__(self, frames, root, levels, design=None, cr4=0, efer=EFER_NXE, **features):
        registers = {
            "efer": EFER_LME | efer,
            "cr4": CR4_PAE | (CR4_LA57 if levels == 5 else 0) | cr4,
            "cr3": root,
            "cr0": CR0_PG | CR0_WP | 0x11,
        }
        if design:
            self.vm = sc.VM(memory=RAM, mmu=design, features=sc.Features(**features))
            words = self.vm.memory.words
            for where, entry in frames.entries.items():
                words[where // 8] = entry
            self.cpu = self.vm.vcpus[0]
            for name, value in registers.items():
                setattr(self.cpu, name, value)
        else:
            self.memory = oracle.Memory((0, RAM // 4096))
            for where, entry in frames.entries.items():
                self.memory.write(where, entry, 8)
            self.cpu = oracle.Cpu(self.memory, oracle.Features(**features))
            for name, value in registers.items():
                getattr(self.cpu, f"load_{name}")(value)


# -- the matrix --------------------------------------------------------------------------------------------

# Flags in the order of the counter, those that toggle most often first.  Present and reserved bits sit
# high, and registers highest, so that they change rarely.  Flags that exclude each other share a digit.
FREE = ["pte.rw", "pte.user", "pte.a", "pte.d", "pde.rw", "pde.user", "pde.a", "pde.d", "pkey=1", "twice"]
ACCESS = [{}, {"user"}, {"write"}, {"fetch"}, {"user", "write"}, {"user", "fetch"}]
HIGH = ["pte.p", "pde.p", "pdpte.ro"]
BITS = {"rw": W, "user": U, "a": A, "d": D, "p": P, "nx": NX, "pse": PS}
BITS |= {"51": 1 << 51, "36": 1 << 36, "13": 1 << 13}


def reserved_digits(maxphyaddr):
    """Combinations of pse, NX bits, EFER.NXE and reserved bits.  At most one reserved bit at a time, a NX
    bit counting as one if EFER.NXE=0; bit 13 of a PDE says something only with PSE; bits below MAXPHYADDR
    are no reserved bits."""
    address_bits = [f"{e}.{bit}" for bit in (51, 36) if bit >= maxphyaddr for e in ("pde", "pte")]
    digits = []
    for nxe, pse in itertools.product((True, False), repeat=2):
        reserved = [*address_bits, *(["pde.13"] if pse else []), *([] if nxe else ["pde.nx", "pte.nx"])]
        nx = [set(), {"pde.nx"}, {"pte.nx"}, {"pde.nx", "pte.nx"}] if nxe else [set()]
        for one, nx_bits in itertools.product([set(), *({bit} for bit in reserved)], nx):
            digits.append(one | nx_bits | ({"efer.nx"} if nxe else set()) | ({"pde.pse"} if pse else set()))
    return digits


def key_digits(pku):
    """PKRU bits say something only with CR4.PKE."""
    with_pke = [{"cr4.pke", *bits} for bits in ([], ["pkru.ad"], ["pkru.wd"], ["pkru.ad", "pkru.wd"])]
    return [set(), *with_pke] if pku else [set()]


class Matrix:
    def __init__(self, maxphyaddr=36, pku=True):
        free = [name for name in FREE if pku or name != "pkey=1"]
        self.digits = [[set(), {name}] for name in free]
        self.digits += [ACCESS, *([set(), {name}] for name in HIGH), reserved_digits(maxphyaddr)]
        self.digits += [[set(), {"cr0.wp"}], key_digits(pku)]
        self.total = int(np.prod([len(choices) for choices in self.digits]))

    def columns(self, numbers):
        """{flag: array of 0/1} for cases of the given numbers."""
        numbers = np.asarray(numbers, dtype=np.int64)
        flags = {}
        for choices in self.digits:
            numbers, digit = np.divmod(numbers, len(choices))
            for name in set().union(*choices):
                flags[name] = np.array([name in choice for choice in choices], dtype=np.uint64)[digit]
        return flags

    def name(self, number):
        return " ".join(sorted(name for name, column in self.columns([number]).items() if column[0]))


def entry(flags, which):
    bits = [name.split(".")[1] for name in flags if name.startswith(f"{which}.")]
    return sum(flags[f"{which}.{bit}"] * np.uint64(BITS[bit]) for bit in bits)


class Cases:
    """The columns of some cases: entry values, register values, access."""

    def __init__(self, matrix, numbers, levels, table):
        flags = matrix.columns(numbers)
        zero = np.zeros(len(numbers), dtype=np.uint64)
        flags.setdefault("pkey=1", zero)
        for name in ("cr4.pke", "pkru.ad", "pkru.wd"):
            flags.setdefault(name, zero)
        key = flags["pkey=1"] << np.uint64(59)
        pse = flags["pde.pse"].astype(bool)
        # A large page takes its key from the PDE; above a PTE, the PDE's key bits (2) are ignored.
        self.pde = entry(flags, "pde") | np.where(pse, np.uint64(PAGE) | key, np.uint64(table | 2 << 59))
        self.pte = entry(flags, "pte") | np.uint64(PAGE) | key
        self.pdpte_flags = np.uint64(P | U | A) | np.uint64(W) * (1 - flags["pdpte.ro"])
        self.efer = np.uint64(EFER_LME) | flags["efer.nx"] * np.uint64(EFER_NXE)
        self.cr0 = np.uint64(CR0_PG | 0x11) | flags["cr0.wp"] * np.uint64(CR0_WP)
        la57 = CR4_LA57 if levels == 5 else 0
        self.cr4 = np.uint64(CR4_PAE | la57) | flags["cr4.pke"] * np.uint64(CR4_PKE)
        # Key 2 always denied, key 1 by flags, key 0 open.
        self.pkru = np.uint64(0x30) | flags["pkru.wd"] << np.uint64(3) | flags["pkru.ad"] << np.uint64(2)
        self.op = flags["write"] * WRITE + flags["fetch"] * FETCH
        self.user = flags["user"]
        self.twice = flags["twice"].astype(bool)


def layout(levels):
    """Tables for the address under test, and large supervisor pages that map all memory at linear 0."""
    frames = Frames()
    root = frames.table()
    for gpa in range(0, RAM, 2 << 20):
        frames.map(root, levels, gpa, gpa | PS | KERNEL_FLAGS, last=2, flags=P | W | A)
    path = frames.map(root, levels, ADDRESS, PAGE | P | W | U)
    return frames, root, path


COLUMNS = ("outcome", "error code", "gpa", "pde", "pte")


def oracle_answers(cases, levels, **features):
    frames, root, (*_, pdpte, pde, pte) = layout(levels)
    machine = Machine(frames, root, levels, **features)
    cpu, memory = machine.cpu, machine.memory
    table = frames.entries[pde] & oracle.bits(51, 12)
    assert (cases.pde[~(cases.pde & np.uint64(PS)).astype(bool)] & np.uint64(table) == table).all()
    directory = frames.entries[pdpte] & oracle.bits(51, 12)
    answers = np.zeros((len(cases.pde), 5), dtype=np.uint64)
    rows = zip(
        *(c.tolist() for c in (cases.pde, cases.pte, cases.pdpte_flags, cases.efer, cases.cr0, cases.cr4)),
        *(c.tolist() for c in (cases.pkru, cases.op, cases.user, cases.twice)),
        strict=True,
    )
    for i, (pde_value, pte_value, pdpte_flags, *registers, pkru, op, user, twice) in enumerate(rows):
        cpu.efer, cpu.cr0, cpu.cr4 = registers
        cpu.efer |= oracle.EFER_LMA
        cpu.pkru = pkru
        memory.write(pde, pde_value, 8)
        memory.write(pte, pte_value, 8)
        memory.write(pdpte, directory | pdpte_flags, 8)
        if twice:
            cpu.step(READ, ADDRESS, size=1)
        outcome, error, gpa, _ = cpu.step(op, ADDRESS, 0xC3, 1, user)
        answers[i] = outcome, error, gpa, memory.read(pde, 8), memory.read(pte, 8)
    return answers


class Engine:
    """Cases as one batch of operations each time, over one machine that lives on."""

    def __init__(self, design, levels, **features):
        frames, root, (*_, self.pdpte, self.pde, self.pte) = layout(levels)
        self.directory = frames.entries[self.pdpte] & oracle.bits(51, 12)
        self.table = frames.entries[self.pde] & oracle.bits(51, 12)
        self.machine = Machine(frames, root, levels, design, **features)

    def answers(self, cases):
        n = len(cases.pde)
        # Slots of a case.  A register's is used when its value changes, those of the first access if "twice".
        slots = [
            (EFER, 0, cases.efer, changes(cases.efer)),
            (CR0, 0, cases.cr0, changes(cases.cr0)),
            (CR4, 0, cases.cr4, changes(cases.cr4)),
            (sc.Op.PKRU, 0, cases.pkru, changes(cases.pkru)),
            (WRITE, self.pdpte, np.uint64(self.directory) | cases.pdpte_flags, True),
            (WRITE, self.pde, cases.pde, True),
            (WRITE, self.pte, cases.pte, True),
            (INVLPG, ADDRESS, 0, cases.twice),
            (READ, ADDRESS, 0, cases.twice),
            (INVLPG, ADDRESS, 0, True),
            (cases.op, ADDRESS, 0xC3, True),
            (READ, self.pde, 0, True),
            (READ, self.pte, 0, True),
        ]
        ops = np.zeros((n, len(slots)), dtype=sc.OP_DTYPE)
        used = np.zeros((n, len(slots)), dtype=bool)
        for i, (op, address, value, when) in enumerate(slots):
            ops["op"][:, i], ops["addr"][:, i], ops["value"][:, i], used[:, i] = op, address, value, when
        ops["size"] = 8
        ops["size"][:, [8, 10]] = 1
        ops["user"][:, 10] = cases.user
        result = self.machine.cpu.run(ops[used])
        spread = {}
        for key in ("outcome", "error_code", "gpa", "value"):
            spread[key] = np.zeros((n, len(slots)), dtype=np.uint64)
            spread[key][used] = getattr(result, key)
        # Register loads and stores to the tables through the kernel's mapping never fault.
        assert not spread["outcome"][:, [*range(8), 11, 12]].any()
        access = [spread[key][:, 10] for key in ("outcome", "error_code", "gpa")]
        return np.stack([*access, spread["value"][:, 11], spread["value"][:, 12]], axis=1)


def changes(column):
    return np.concatenate([[True], column[1:] != column[:-1]])


def check(matrix, numbers, levels, **features):
    engines = {design: Engine(design, levels, **features) for design in DESIGNS}
    for chunk in np.array_split(numbers, max(1, len(numbers) // 50_000)):
        cases = Cases(matrix, chunk, levels, engines["native"].table)
        want = oracle_answers(cases, levels, **features)
        for design, engine in engines.items():
            got = engine.answers(cases)
            bad = np.flatnonzero((got != want).any(axis=1))
            told = [
                f"{matrix.name(chunk[i])}: "
                + ", ".join(
                    f"{column} {int(g):#x}, not {int(w):#x}"
                    for column, g, w in zip(COLUMNS, got[i], want[i], strict=True)
                    if g != w
                )
                for i in bad[:5]
            ]
            assert not told, f"{design}: {len(bad)} of {len(chunk)} cases\n" + "\n".join(told)
            assert engine.machine.vm.audit().ok


@pytest.mark.parametrize(
    ("maxphyaddr", "pku", "cases"),
    [
        (36, True, 28_999_680),
        (36, False, 2_899_968),
        (46, True, 19_169_280),
        (46, False, 1_916_928),
        (52, True, 9_338_880),
        (52, False, 933_888),
    ],
)
def test_number_of_cases(maxphyaddr, pku, cases):
    """The counts of access.c, which were also found by going through all 2^30 combinations."""
    assert Matrix(maxphyaddr, pku).total == cases


@pytest.mark.parametrize(("maxphyaddr", "levels"), [(36, 4), (46, 4), (52, 4), (36, 5)])
def test_sample(maxphyaddr, levels):
    matrix = Matrix(maxphyaddr)
    check(matrix, np.arange(0, matrix.total, 719), levels, maxphyaddr=maxphyaddr)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [4, 5])
def test_every_case(levels):
    matrix = Matrix()
    step = 1_000_000
    for start in range(0, matrix.total, step):
        numbers = np.arange(start, min(start + step, matrix.total))
        check(matrix, numbers, levels, maxphyaddr=36)


# -- rights in every mode ----------------------------------------------------------------------------------

# Bytes of an entry, and levels (for PAE without the root registers).
MODES = {"32": (4, 2), "pae": (8, 2), "64": (8, 4), "la57": (8, 5)}


def rights_program(mode):
    """Every combination of W, U, NX of the two lowest levels with WP, SMEP, SMAP, AC, NXE and the access,
    as rows (op, addr, value, size, user) of one program.  Memory is mapped at linear 0 by supervisor
    tables; the page under test is at 16 MiB, by a table of its own."""
    width, levels = MODES[mode]
    paging = CR0_PG | 0x11
    cr4 = {"32": CR4_PSE, "pae": CR4_PAE, "64": CR4_PAE, "la57": CR4_PAE | CR4_LA57}[mode]
    lme = EFER_LME if levels > 3 else 0
    page, test = 7 << 12, 16 << 20
    tables = {}
    base = 1 << 12
    if mode == "pae":
        tables[base] = 2 << 12 | P
        base = 2 << 12
    for _ in range(levels - 2):
        tables[base] = base + 4096 | P | W | U
        base += 4096
    large = 22 if mode == "32" else 21
    tables[base] = PS | KERNEL_FLAGS
    pde = base + (test >> large) * width
    pte = base + 4096
    rows = [
        (EFER, 0, lme, 8, 0),
        (CR4, 0, cr4, 8, 0),
        (CR3, 0, 1 << 12, 8, 0),
        (CR0, 0, paging, 8, 0),
    ]
    rights = [w | u | nx for w in (0, W) for u in (0, U) for nx in ((0, NX) if width == 8 else (0,))]
    kinds = [(op, user) for op in (READ, WRITE, FETCH) for user in (0, 1)]
    switches = itertools.product((0, CR0_WP), (0, CR4_SMEP), (0, CR4_SMAP), (0, 1), (0, EFER_NXE))
    for wp, smep, smap, ac, nxe in switches:
        rows += [
            (EFER, 0, lme | nxe, 8, 0),
            (CR0, 0, paging | wp, 8, 0),
            (CR4, 0, cr4 | smep | smap, 8, 0),
            (sc.Op.AC, 0, ac, 8, 0),
        ]
        for upper, lower in itertools.product(rights, repeat=2):
            for op, user in kinds:
                rows += [
                    (WRITE, pde, pte | P | upper, width, 0),
                    (WRITE, pte, page | P | lower, width, 0),
                    (INVLPG, test, 0, 8, 0),
                    (op, test | 8, 0x77, 4, user),
                    (READ, pde, 0, width, 0),
                    (READ, pte, 0, width, 0),
                ]
    return tables, width, rows


@pytest.mark.parametrize("mode", MODES)
def test_rights_in_every_mode(mode):
    tables, width, rows = rights_program(mode)
    reference = oracle.Cpu(oracle.Memory((0, 256)))
    vms = [sc.VM(memory=256 * 4096, mmu=design) for design in DESIGNS]
    for where, value in tables.items():
        reference.memory.write(where, value, width)
        for vm in vms:
            vm.memory.bytes[where : where + width] = np.frombuffer(value.to_bytes(width, "little"), np.uint8)
    want = []
    for op, address, value, size, user in rows:
        if op == sc.Op.AC:
            reference.ac = bool(value)
            want.append((OK, 0, oracle.NO_GPA, 0))
        else:
            want.append(reference.step(op, address, value, size, bool(user)))
    want = np.array(want, dtype=np.uint64).T
    ops = streams.ops_array(rows, sc.OP_DTYPE)
    read = (ops["op"] == READ) & (want[0] == OK)
    for vm in vms:
        result = vm.vcpus[0].run(ops)
        np.testing.assert_array_equal(result.outcome, want[0])
        np.testing.assert_array_equal(result.error_code, want[1])
        np.testing.assert_array_equal(result.gpa, want[2])
        np.testing.assert_array_equal(result.value[read], want[3][read])
        assert vm.audit().ok


# -- the special tests of access.c -------------------------------------------------------------------------


def special(design, build, **settings):
    """A machine over tables made by `build(frames, root)`; the kernel has all memory at linear 0."""
    frames = Frames()
    root = frames.table()
    for gpa in range(0, RAM, 2 << 20):
        frames.map(root, 4, gpa, gpa | PS | KERNEL_FLAGS, last=2, flags=P | W | A)
    made = build(frames, root)
    machine = Machine(frames, root, 4, design, **settings)
    return machine.cpu, made


def faults(access, *args, **kwargs):
    """The error code of the fault that an access ends in."""
    with pytest.raises(sc.PageFault) as caught:
        access(*args, **kwargs)
    return caught.value.error_code


@pytest.mark.parametrize("design", DESIGNS)
def test_large_page_mapped_read_only_and_writable(design):
    """Two addresses share a 2 MiB page, one read-only: a write through the other must not open the first."""
    ro, rw = ADDRESS, ADDRESS + (2 << 20)

    def build(frames, root):
        frames.map(root, 4, ro, PAGE | PS | P | U, last=2)
        frames.map(root, 4, rw, PAGE | PS | P | U | W, last=2)

    cpu, _ = special(design, build)
    cpu.read(ro)
    cpu.read(rw)
    cpu.write(rw, 1)
    assert faults(cpu.write, ro, 2) == PF_P | PF_W
    assert cpu.read(ro) == 1


@pytest.mark.parametrize("design", DESIGNS)
def test_reserved_bit_in_a_neighbouring_entry(design):
    """An access to the first of two neighbouring entries may bring in the second as well: its reserved bit
    (NX with EFER.NXE=0) must still be reported."""

    def build(frames, root):
        frames.map(root, 4, ADDRESS, PAGE | P | W | U)
        frames.map(root, 4, ADDRESS + 4096, PAGE | P | W | U | NX)

    cpu, _ = special(design, build, efer=0)
    cpu.read(ADDRESS)
    assert faults(cpu.read, ADDRESS + 4096) == PF_P | PF_RSVD


@pytest.mark.parametrize("design", DESIGNS)
def test_dirty_bit_of_read_only_large_pages_without_wp(design):
    """CR0.WP=0: a supervisor write through each of two read-only large pages over the same memory sets D in
    each."""
    first, second = ADDRESS, ADDRESS + (2 << 20)

    def build(frames, root):
        return [frames.map(root, 4, va, PAGE | PS | P | U, last=2)[-1] for va in (first, second)]

    cpu, entries = special(design, build)
    cpu.cr0 &= ~CR0_WP
    cpu.read(first)
    cpu.write(second, 1)
    assert cpu.read(entries[0]) & (A | D) == A
    cpu.write(first, 2)
    assert [cpu.read(where) & (A | D) for where in entries] == [A | D, A | D]


@pytest.mark.parametrize("design", DESIGNS)
def test_supervisor_write_then_fetch_with_smep(design):
    """SMEP: a supervisor page made of a user page for a WP=0 write (so that KVM could grant it) must not
    become executable for the supervisor.  With WP=1 the write itself is refused."""

    def build(frames, root):
        frames.map(root, 4, ADDRESS, PAGE | P | U)

    cpu, _ = special(design, build, cr4=CR4_SMEP)
    assert faults(cpu.write, ADDRESS, 1) == PF_P | PF_W
    assert faults(cpu.fetch, ADDRESS) == PF_P | oracle.PF_I
    cpu.cr0 &= ~CR0_WP
    cpu.write(ADDRESS, 1)
    assert faults(cpu.fetch, ADDRESS) == PF_P | oracle.PF_I


@pytest.mark.parametrize("design", DESIGNS)
def test_toggling_wp_needs_no_invlpg(design):
    """A supervisor write to a read-only page: granted with WP=0, refused with WP=1, each time without
    INVLPG, and with EFER.NXE toggled in between."""

    def build(frames, root):
        frames.map(root, 4, ADDRESS, PAGE | P | U)

    cpu, _ = special(design, build)
    for _ in range(3):
        cpu.cr0 &= ~CR0_WP
        cpu.write(ADDRESS, 1)
        cpu.cr0 |= CR0_WP
        assert faults(cpu.write, ADDRESS, 2) == PF_P | PF_W
        cpu.efer ^= EFER_NXE
    assert cpu.read(ADDRESS) == 1


@pytest.mark.parametrize("design", DESIGNS)
def test_rights_of_a_table_shared_by_two_parents(design):
    """Two directory pointers, one read-only, share a directory: what the writable path fills must not be
    found with write access through the read-only path, and the other way round."""

    def build(frames, root):
        giga = 1 << 30
        path = frames.map(root, 4, ADDRESS, PAGE | P | W | U, flags=P | W | U | A)
        frames.map(root, 4, ADDRESS + (2 << 20), PAGE + 4096 | P | W | U)
        directory = frames.entries[path[1]] & oracle.bits(51, 12)
        frames.entries[path[2]] &= ~W  # first entry of the shared directory: read-only
        frames.map(root, 4, ADDRESS + giga, directory | P | U | A, last=3)
        return [ADDRESS, ADDRESS + (2 << 20), ADDRESS + giga, ADDRESS + giga + (2 << 20)]

    cpu, (rw_ro, rw_rw, ro_ro, ro_rw) = special(design, build)
    cpu.read(rw_ro, user=True)
    cpu.write(rw_rw, 1, user=True)
    cpu.read(ro_ro, user=True)
    assert faults(cpu.write, ro_rw, 2, user=True) == PF_P | PF_W | oracle.PF_U
    assert faults(cpu.write, rw_ro, 2, user=True) == PF_P | PF_W | oracle.PF_U
    cpu.write(rw_rw, 3, user=True)
    assert cpu.read(ro_rw, user=True) == 3
