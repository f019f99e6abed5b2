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
from access_machine import ADDRESS, DESIGNS, KERNEL_FLAGS, PAGE, RAM, Frames, Machine
from oracle import (
    CR0,
    CR0_PG,
    CR0_WP,
    CR4,
    CR4_LA57,
    CR4_PAE,
    CR4_PKE,
    EFER,
    EFER_LME,
    EFER_NXE,
    FETCH,
    INVLPG,
    NX,
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
        # LMA as it is: AMD's refuse a load that says otherwise, Intel's do not look at it.
        self.efer = np.uint64(EFER_LME | oracle.EFER_LMA) | flags["efer.nx"] * np.uint64(EFER_NXE)
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


@pytest.mark.parametrize("levels", [4, 5])
def test_sample_of_amd(levels):
    """Where the vendors differ in upper entries, test_implicit.py has them in each level."""
    matrix = Matrix(36)
    check(matrix, np.arange(0, matrix.total, 1439), levels, maxphyaddr=36, vendor="amd")


@pytest.mark.slow
@pytest.mark.parametrize("vendor", ["intel", "amd"])
@pytest.mark.parametrize("levels", [4, 5])
def test_every_case(levels, vendor):
    matrix = Matrix()
    step = 1_000_000
    for start in range(0, matrix.total, step):
        numbers = np.arange(start, min(start + step, matrix.total))
        check(matrix, numbers, levels, maxphyaddr=36, vendor=vendor)
