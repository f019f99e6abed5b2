"""The streams and page tables under tests/data, in the form that the tests use."""

import dataclasses
from functools import cache, lru_cache

import numpy as np
import oracle
from places import DATA

import shadowcore as sc

STREAMS = sorted(path.stem for path in (DATA / "kvm-2007").glob("*.npz"))
LINUX = ["linux_2lvl", "linux_pae", "linux_4lvl", "linux_la57"]
ENGINES = ("before", "after", "rel21")

# The streams number outcomes 0 done, 1 #PF, 2 device, 3 crash, 4 #GP, 5 hang, 7 not run; here they become
# those of RunResult, and the three that are no answer of an architecture become 255.
OUTCOME = np.array([oracle.OK, oracle.PAGE_FAULT, oracle.MMIO, 255, oracle.GENERAL_PROTECTION, 255, 255, 255])

# The streams were made for processors with 40 physical address bits, and of checks that refuse bits of CR0 and CR3
# which processors ignore.
FEATURES_2007 = oracle.Features(maxphyaddr=40, refuses_ignored_bits=True)


def strict(design):
    """A design, or the one of a name, whose processor refuses the bits that the streams' does."""
    made = sc.config.design(design)
    return dataclasses.replace(made, quirks=made.quirks | sc.Quirk.IGNORED_BITS_REFUSED)


@lru_cache(maxsize=2)
def stream(name):
    with np.load(DATA / "kvm-2007" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@lru_cache(maxsize=2)
def linux(name):
    with np.load(DATA / "linux-pagetables" / f"{name}.npz") as file:
        tables = {key: file[key] for key in file.files}
    tables["mem_page"] = tables["mem_page"].copy()
    if str(tables["mode"]) == "pae":
        clear_accessed_bit_of_pdptes(tables)
    return tables


def clear_accessed_bit_of_pdptes(tables):
    """The emulator that listed these tables marks PDPTEs accessed.  Bit 5 is reserved there (SDM table 4-8):
    no processor sets it, and CR3 loads of such a table are refused."""
    words = tables["mem_page"].view("<u8")
    frame = {int(gfn): i for i, gfn in enumerate(tables["mem_gfn"])}
    for root in tables["root"].tolist():
        first = root % 4096 // 8
        words[frame[root // 4096], first : first + 4] &= ~np.uint64(oracle.A)


def is_access(ops):
    return np.isin(ops["op"], (oracle.READ, oracle.WRITE, oracle.FETCH))


def architecture(results):
    """(outcome, error code, gpa) that the architecture gives, from one engine's results."""
    return OUTCOME[results["arch_outcome"]], results["arch_err"], results["arch_gpa"]


def first_deviation(results):
    """Number of the first operation at which a 2007 engine was wrong; from the next one on its guest memory,
    and so its arch_* fields, can be those of another history."""
    wrong = OUTCOME[results["outcome"]] != OUTCOME[results["arch_outcome"]]
    wrong |= (results["outcome"] == 1) & (results["err"] != results["arch_err"])
    wrong |= results["gpa"] != results["arch_gpa"]
    return int(np.flatnonzero(wrong)[0]) if wrong.any() else len(results)


def oracle_cpu(tables, features=None, cls=oracle.Cpu):
    memory = oracle.Memory.of_frames(int(tables["nframes"]), tables["mem_gfn"], tables["mem_page"])
    return cls(memory, features)


def set_registers(cpu, tables):
    """Enter the paging mode of a Linux dump, on an oracle or an engine processor."""
    registers = [(name, int(tables[name])) for name in ("efer", "cr4", "cr3", "cr0")]
    for name, value in registers:
        if isinstance(cpu, oracle.Cpu):
            getattr(cpu, f"load_{name}")(value)
        else:
            setattr(cpu, name, value)


@cache
def expected(name):
    """What the oracle does with a stream: columns (outcome, error, gpa, value), and the final frames. Several files of
    tests ask for each; all of them are 45 MB."""
    data = stream(name)
    cpu = oracle_cpu(data, FEATURES_2007)
    results = np.array(cpu.run(data["ops"]), dtype=np.uint64)
    results.flags.writeable = False
    return results.T, {gfn: bytes(page) for gfn, page in cpu.memory.frames.items() if any(page)}


def put_frames(vm, gfns, pages):
    """Initial contents of guest memory, before the guest runs."""
    frames = vm.memory.bytes.reshape(-1, oracle.PAGE)
    frames[np.asarray(gfns, dtype=np.intp)] = pages


def machine(data, mmu, **settings):
    """A VM with the memory that a stream or a Linux dump begins with."""
    vm = sc.VM(memory=int(data["nframes"]) * oracle.PAGE, mmu=mmu, **settings)
    put_frames(vm, data["mem_gfn"], data["mem_page"])
    return vm


def saved_half_way(name, mmu, path):
    """A VM that was saved after one half of a stream, and the one that was loaded from that; both have run the other
    half, with equal results and counters."""
    data = stream(name)
    half = len(data["ops"]) // 2
    vm = machine(data, mmu)
    vm.vcpus[0].run(data["ops"][:half])
    vm.save(path)
    loaded = sc.VM.load(path)
    assert loaded.mmu.design == vm.mmu.design
    one, other = (each.vcpus[0].run(data["ops"][half:]) for each in (vm, loaded))
    for column in ("outcome", "error_code", "gpa", "value", "exits"):
        np.testing.assert_array_equal(getattr(other, column), getattr(one, column))
    assert vm.stats.as_dict() == loaded.stats.as_dict()
    return vm, loaded


def frames_of(vm):
    """{gfn: bytes} of the frames that are not all zero."""
    frames = vm.memory.bytes.reshape(-1, oracle.PAGE)
    used = vm.memory.words.reshape(-1, oracle.PAGE // 8).any(axis=1)
    return {int(gfn): frames[gfn].tobytes() for gfn in np.flatnonzero(used)}


def different_frames(got, wanted):
    return sorted(gfn for gfn in got.keys() | wanted.keys() if got.get(gfn) != wanted.get(gfn))
