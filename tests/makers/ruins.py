"""Machines whose shadow structure is ruined by hand: random words in its arrays, scalars, registers and TLB.

They run in processes of their own, with walls around the engine's arrays, so that a wrong index is a crash that names
what was written. `python tests/makers/ruins.py NAME SEED ROUNDS [use]` does in this process what in_a_process does in
another.
"""

import os
import random
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from guest2007 import DATA, PAGE, RAM, USED, USER

import shadowcore as sc

NAMES = ["table", "pages", "frames", "links", "hash", "all", "tlb", "scalars"]
MANY = 0x80000000
NONE = 0xFFFFFFFF
POOL = 40
ALIAS = USER + (16 << 20)
LARGE = USER + (64 << 20)


def in_a_process(name, seed, rounds, use=False, seconds=120):
    """Run `run` there. AssertionError with what was written last, where it ends otherwise than it should."""
    command = [sys.executable, __file__, name, str(seed), str(rounds), *(["use"] if use else [])]
    paths = [str(Path(sc.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
        output, end = child.stdout, f"ended with {child.returncode}: {child.stderr[-500:]}"
    except subprocess.TimeoutExpired as error:
        output, end = bytes(error.stdout or b"").decode(), "hung"
    lines = output.splitlines()
    last = lines[-[*lines[::-1], "survived"].index("survived") :]
    assert lines[-1:] == ["done"], f"{end}, after {last}"


def between_walls(nbytes, huge=False):
    """Memory that ends where nothing may be touched, so that a wrong index is a crash and not another's data."""
    import ctypes
    import mmap

    wall = 1 << 33
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    room = np.frombuffer(mmap.mmap(-1, size + 2 * wall, flags=flags), dtype=np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for start in (0, wall + size):
        if protect(room.ctypes.data + start, wall, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    end = wall + size
    return room[end - -(-nbytes // 8) * 8 :][:nbytes]


def ruin(rng, array):
    """Write a word or a field somewhere, often one that is an index of something; says what was written."""
    limit = POOL * 512
    number = rng.choice(
        [rng.getrandbits(64), rng.getrandbits(32), rng.randrange(POOL + 2), rng.randrange(limit + 2), 0, (1 << 64) - 1]
    ) | rng.choice([0, 0, 0, MANY])
    if array.dtype.names and rng.random() < 0.7:
        name = rng.choice(array.dtype.names)
        part = array[name].reshape(len(array), -1)
        where = rng.randrange(len(array)), rng.randrange(part.shape[1])
        part[where] = number & (1 << 8 * part.dtype.itemsize) - 1
        return f"{name}{list(where)} = {int(part[where]):#x}"
    words = array.reshape(-1).view("<u4")
    used = np.flatnonzero(words)
    at = int(rng.choice(used)) if len(used) and rng.random() < 0.6 else rng.randrange(len(words))
    if rng.random() < 0.3:
        number = int(words[rng.randrange(len(words))])
    elif rng.random() < 0.2:
        number = int(words[at]) ^ 1 << rng.randrange(32)
    words[at] = number & 0xFFFFFFFF
    return f"word {at} = {int(words[at]):#x}"


def machine(mode, design):
    """Two processors that have used 120 pages, with a TLB and a dirty log."""
    vm = sc.VM(memory=RAM, mmu=design(pool_pages=POOL), tlb=sc.TLB(), vcpus=2)
    vm.memory.start_dirty_log()
    tables = sc.PageTables(vm.memory, mode)
    tables.map(USER, DATA, 40 * PAGE, **USED)
    tables.map(ALIAS, DATA, 40 * PAGE, **USED)
    tables.map(LARGE, 0, 4 << 20, accessed=True, dirty=True)
    for cpu in vm.vcpus:
        for register, value in tables.registers.items():
            setattr(cpu, register, value)
        for va in (USER, ALIAS, LARGE):
            for i in range(40):
                cpu.write(va + i * PAGE, i)
    assert vm.audit().ok
    return vm


class State:
    """All that makes a VM, to be put back."""

    def __init__(self, vm):
        self.vm = vm
        self.ram = vm.memory.bytes.copy()
        self.arrays = {name: array.copy() for name, array in vm.mmu.arrays.items()}
        self.log = vm.memory.dirty_words().copy()
        self.scalars = vm.mmu.export_state()
        self.vcpus = [(cpu.export_state(), [array.copy() for array in cpu.tlb_arrays]) for cpu in vm.vcpus]

    def put_back(self):
        self.vm.memory.bytes[:] = self.ram
        self.vm.memory.dirty_words()[:] = self.log
        for name, array in self.vm.mmu.writable_arrays().items():
            array[...] = self.arrays[name]
        array = None
        self.vm.mmu.import_state(self.scalars)
        for cpu, (registers, tlb) in zip(self.vm.vcpus, self.vcpus, strict=True):
            cpu.import_state(registers)
            cpu.import_tlb(tlb)


def write(vm, rng, name, state):
    """Ruin something of the part `name`; says what."""
    if name == "tlb":
        cpu = rng.choice(vm.vcpus)
        arrays = [array.copy() for array in cpu.tlb_arrays]
        what = ruin(rng, rng.choice([array for array in arrays if array.size % 4 == 0]))
        with suppress(sc.ConfigError):
            cpu.import_tlb(arrays)
        return what
    if name == "scalars":
        first = vm.vcpus[0]
        key = rng.choice([key for key in state.scalars if key != "counters"])
        ruined = {key: rng.choice([rng.getrandbits(32), rng.randrange(POOL + 2), NONE])}
        roots = [rng.choice([NONE, POOL, rng.randrange(POOL), rng.getrandbits(32)]) for _ in range(4)]
        with suppress(sc.ConfigError):  # what does not exist is refused
            vm.mmu.import_state(vm.mmu.export_state() | ruined)
        if rng.random() < 0.5:
            with suppress(sc.ConfigError):
                vm.vcpus[0].import_state(state.vcpus[0][0] | {"roots": roots})
        lagging = state.vcpus[0][0].keys() & {
            "requests",
            "previous",
            "loaded",
            "root_cr3",
            "device_rights",
            "device_gfn",
        }
        if lagging and rng.random() < 0.5:
            key = rng.choice(sorted(lagging))
            number = rng.choice([0, 1, 32, rng.getrandbits(6), rng.randrange(POOL + 2), rng.getrandbits(32)])
            value = [[rng.choice([first.cr3, number]), root] for root in roots[:3]] if key == "previous" else number
            with suppress(sc.ConfigError):
                first.import_state(first.export_state() | {key: value})
            return f"{ruined} {roots} {key} {value}"
        return f"{ruined} {roots}"
    if name == "all":
        name = rng.choice(list(state.arrays))
    return f"{name}: {ruin(rng, vm.mmu.writable_arrays()[name])}"


def use(vm, rng, directory):
    """Call whatever there is: each call ends, in one of our own errors if it does not succeed."""
    first, second = vm.vcpus
    where = [USER, ALIAS, LARGE, USER + 40 * PAGE, 0, (1 << 31) - 8, rng.getrandbits(48)]
    ops = np.zeros(200, dtype=sc.OP_DTYPE)
    ops["op"] = rng.choices([sc.Op.READ, sc.Op.WRITE, sc.Op.FETCH, sc.Op.INVLPG, sc.Op.XCHG], k=200)
    ops["user"] = rng.choices([0, 1], k=200)
    ops["size"] = rng.choices([1, 2, 4, 8], k=200)
    ops["addr"] = [rng.choice(where) + rng.randrange(42 * PAGE) for _ in range(200)]
    ops["value"] = rng.getrandbits(63)
    tables = [int(gfn) << 12 for gfn in np.unique(vm.mmu.arrays["pages"]["gfn"]) if gfn < RAM >> 12]
    va = rng.choice(where) + rng.randrange(42) * PAGE
    calls = [
        lambda: first.run(ops),
        lambda: second.run(ops, data=True),
        lambda: first.read(va),
        lambda: second.write(va, 1, 4),
        lambda: first.fetch(va),
        lambda: first.modify(va, "xchg", 1, 4),
        lambda: second.invlpg(va),
        lambda: first.translate(va),
        lambda: first.walk_levels(va),
        lambda: setattr(rng.choice(vm.vcpus), "cr3", first.cr3),
        lambda: setattr(rng.choice(vm.vcpus), "cr4", first.cr4 ^ 1 << 7),
        lambda: setattr(rng.choice(vm.vcpus), "cr0", first.cr0 ^ 1 << 16),
        lambda: setattr(first, "cr0", first.cr0 ^ 1 << 31),
        vm.audit,
        lambda: vm.audit(strict=True),
        lambda: vm.mmu.pages,
        lambda: vm.mmu.rmap(rng.randrange(RAM >> 12)),
        lambda: [vm.mmu.rmap_length(gfn) for gfn in range(RAM >> 12)],
        lambda: vm.mmu.table(rng.randrange(POOL)),
        lambda: (vm.mmu.roots(0), vm.mmu.roots(1), vm.mmu.pages_used, str(vm), str(vm.mmu), first.tlb, vm.stats),
        lambda: vm.mmu.unprotect(rng.choice(tables) >> 12),
        vm.mmu.zap_all,
        lambda: vm.write_physical(rng.choice(tables) + rng.randrange(4089), rng.randbytes(8)),
        lambda: vm.write_physical(DATA, b"device"),
        lambda: vm.memory.clear_dirty_log(),
        lambda: vm.mmu.fail_pages(rng.randrange(3), rng.randrange(2)),
        lambda: (vm.save(directory / "vm"), sc.VM.load(directory / "vm").vcpus[0].run(ops)),
    ]
    rng.shuffle(calls)
    for call in calls:
        if call is calls[0] or rng.random() < 0.3:
            with suppress(sc.errors.ShadowcoreError):
                call()


def run(name, seed, rounds, used):
    """Ruin the part `name` again and again, audit, and (used) call everything; each time from a sound state."""
    import shadowcore.engine.memory
    import shadowcore.engine.mmu
    import shadowcore.engine.vcpu

    if sys.platform == "linux":
        for module in (shadowcore.engine.memory, shadowcore.engine.mmu, shadowcore.engine.vcpu):
            module.allocate = between_walls
    rng = random.Random(f"{name} {seed}")
    accepted = 0
    designs = [sc.Shadow.cached, sc.Shadow.unsync]
    if used:
        designs += [sc.Shadow.flush, sc.Shadow.kvm_2007]
    with tempfile.TemporaryDirectory() as directory:
        for design in designs:
            for mode in ("32", "pae", "64"):
                vm = machine(mode, design)
                sound = State(vm)
                for _ in range(rounds):
                    for _ in range(rng.choice([1, 1, 1, 2, 4, 40])):
                        print(design.__name__, mode, write(vm, rng, name, sound), flush=True)
                    str(vm.audit())
                    if used:
                        with suppress(sc.AuditError):
                            vm.mmu.settle()
                            accepted += 1
                        use(vm, rng, Path(directory))
                    sound.put_back()
                    print("survived", flush=True)
                vm.mmu.settle()
                vm.audit(strict=True)
    print(f"accepted {accepted} of {rounds * len(designs) * 3}", file=sys.stderr)
    print("done")


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "use" in sys.argv[4:])
