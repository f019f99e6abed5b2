"""Saved machines with one thing in them made odd, under a digest that is right again: see test_snapshot_forged.py.

Run as a program it loads some of them, and says of each, before and after, what it is and what came of it: a crash or
a hang of the loader is then a failed test that names the file, and not the end of all tests.
"""

import copy
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import shadowcore as sc
from shadowcore.engine import snapshot
from shadowcore.engine.mmu import FRAME_DTYPE, HISTORY_DTYPE, LINK_DTYPE, PAGE_DTYPE

PAGE = 4096
RAM = 64 * PAGE
POOL = 16
NONE = 0xFFFFFFFF
MANY = 0x80000000
LINEAR = 0x400000

TLB_HEADER = np.dtype(
    [
        ("clock", "<u8"),
        ("epoch", "<u8"),
        ("fragments", "<u8"),
        ("turn", "<u8"),
        ("shifts", "<u8"),
        ("cache_epoch", "<u4", 4096),
        ("pcid_epoch", "<u4", 4096),
        ("due_all", "<u8"),
        ("due_pcid", "<u8", 4096),
        ("due_page", "<u8", 64),
        ("due_page_at", "<u8", 64),
        ("due_page_pcid", "<u2", 64),
        ("due_next", "<u4"),
        ("pad", "<u4"),
    ]
)
TLB_ENTRY = np.dtype(
    [
        *((name, "<u8") for name in ("page", "gpa", "mmu_epoch", "epoch", "filled", "used")),
        ("pcid_epoch", "<u4"),
        ("pcid", "<u2"),
        *((name, "u1") for name in ("access", "pkey", "dirty", "is_global", "shift", "guest_shift")),
        ("root", "<u4"),
    ]
)
FIELDS = {"mmu_pages": PAGE_DTYPE, "mmu_frames": FRAME_DTYPE, "mmu_links": LINK_DTYPE, "mmu_history": HISTORY_DTYPE}
SINGLE = {"mmu_table": "<u8", "mmu_hash": "<u4", "mmu_below": "<u8", "mmu_mapped": "<u2"}
SINGLE |= {"host_frames": "u1", "host_blocks": "u1"}
SINGLE |= dict.fromkeys(("mmu_large_rmap_2m", "mmu_large_rmap_1g", "mmu_no_large_2m", "mmu_no_large_1g"), "<u4")


def machine(design, mode, tlb=None, vcpus=1, logged=False):
    """A small machine in the middle of its work: pages shared by several addresses, tables that were stored to."""
    mmu = design if design == "native" else sc.Shadow.cached(pool_pages=POOL)
    mmu = sc.Shadow.flush(pool_pages=POOL) if design == "flush" else mmu
    mmu = sc.Shadow.kvm_2007(pool_pages=POOL) if design == "kvm-2007" else mmu
    mmu = sc.Shadow.unsync(pool_pages=POOL) if design == "unsync" else mmu
    mmu = sc.Shadow.adaptive(pool_pages=POOL) if design == "adaptive" else mmu
    slots = [sc.MemorySlot(0, RAM - 8 * PAGE, dirty_log=logged), sc.MemorySlot(1 << 24, 8 * PAGE)]
    vm = sc.VM(slots, mmu, vcpus, tlb)
    if mode != "off":
        tables = sc.PageTables(vm.memory, mode, allocate=range(20, 50))
        tables.map(LINEAR, 0, 16 * PAGE, "rwxu")
        tables.map(LINEAR + (64 << 12), 4 * PAGE, 4 * PAGE, "rx")
        tables.map(LINEAR + (1 << 28), 20 * PAGE, 30 * PAGE, "rwx")
        for cpu in vm.vcpus:
            for register, value in tables.registers.items():
                setattr(cpu, register, value)
    use(vm, LINEAR if mode != "off" else 0)
    return vm


def use(vm, base=LINEAR):
    """What a guest does. Whatever happens to it, it is said by an error of the package's own."""
    for cpu in vm.vcpus:
        for at in (base, base + 8, base + 5 * PAGE, base + (64 << 12), base + (1 << 28), base + (1 << 28) + 5 * PAGE):
            for do in (
                lambda at=at, cpu=cpu: cpu.read(at),
                lambda at=at, cpu=cpu: cpu.write(at + 16, 0x77, user=True),
                lambda at=at, cpu=cpu: cpu.modify(at, "or", 0),
                lambda at=at, cpu=cpu: cpu.fetch(at),
            ):
                attempt(do)


def attempt(do):
    try:
        return do()
    except sc.errors.ShadowcoreError as error:
        return error


def use_up(vm):
    """Everything that follows an index: accesses, register loads, zaps, logs, batches, the views from Python."""
    use(vm)
    use(vm, 0)
    ops = np.zeros(64, dtype=sc.OP_DTYPE)
    ops["op"], ops["addr"] = np.arange(64) % 2, LINEAR + np.arange(64, dtype=np.uint64) * 520
    ops["size"] = 8
    shadow = type(vm.mmu.design).__name__ == "Shadow"
    for cpu in vm.vcpus:
        attempt(lambda cpu=cpu: cpu.run(ops))
        attempt(lambda cpu=cpu: cpu.invlpg(LINEAR))
        attempt(lambda cpu=cpu: setattr(cpu, "cr3", cpu.cr3))
        attempt(lambda cpu=cpu: setattr(cpu, "cr0", cpu.cr0 ^ 1 << 16))
        attempt(lambda cpu=cpu: setattr(cpu, "cr4", cpu.cr4 ^ 1 << 7))
        len(cpu.tlb)
    use(vm)
    for slot in vm.memory.logged_slots:
        vm.memory.clear_dirty_log(slot)
    if shadow:
        len(vm.mmu.pages)
        attempt(lambda: vm.mmu.rmap(5))
        attempt(lambda: vm.mmu.unprotect(20))
        attempt(vm.mmu.zap_all)
    use(vm)
    attempt(lambda: vm.host_unmap(3, 6))
    attempt(lambda: vm.host_touch(4, 2, write=False))
    use(vm)
    for number, slot in enumerate(vm.memory.slots):
        if slot and number:
            attempt(lambda number=number: vm.set_slot(number, gpa=1 << 28))
            attempt(lambda number=number: vm.remove_slot(number))
    attempt(lambda: vm.add_slot(20 * PAGE, PAGE, read_only=True))
    attempt(lambda: vm.add_slot(1 << 26, 4 * PAGE, backing="cold"))
    use(vm)


def backed(design, mode, **more):
    """A machine whose slots lie anywhere, one of them read-only, and whose host has not all of its memory."""
    vm = machine(design, mode, **more)
    vm.remove_slot(1)
    vm.add_slot(1 << 25, 8 * PAGE, slot=3, read_only=True)
    vm.host_unmap(5, 3)
    vm.host_unmap(8, 2, discard=True)
    use(vm, LINEAR)
    vm.host_unmap(6)
    return vm


def lagging(mode, vcpus=1, base=LINEAR):
    """A machine of design `unsync` with a large leaf, an unsync table, roots of earlier CR3s and pending requests."""
    vm = sc.VM("4MiB", sc.Shadow.unsync(pool_pages=POOL, min_free=0, refill=0), vcpus, host_page_size="2MiB")
    tables = sc.PageTables(vm.memory, mode, allocate=range(512, 560))
    large = 1 << tables.format.shift(2)
    tables.map(base, 0, 16 * PAGE, "rwxu", PAGE, accessed=True, dirty=True)
    tables.map(base + (1 << 28), 512 * PAGE, 48 * PAGE, "rwx", PAGE, accessed=True, dirty=True)
    tables.map(1 << 29, 0, large, "rwxu", large, accessed=True, dirty=True)
    for cpu in vm.vcpus:
        for register, value in tables.registers.items():
            setattr(cpu, register, value)
        if mode == "64":
            cpu.cr3 = cpu.cr3 | 8
            cpu.read(base)
            cpu.cr3 = cpu.cr3 & ~8
        attempt(lambda cpu=cpu: cpu.write((1 << 29) + 5, 1))
        cpu.write(base, 1)
        cpu.write(base + (1 << 28) + tables.entry(base).gpa - (512 << 12) + 16, 0, tables.format.entry_size)
    use(vm, base)
    return vm


PROCESSOR = sc.ProcessorTLB(
    load=(sc.TLBBank(4, 2),),
    fetch=(sc.TLBBank(2),),
    second=(sc.TLBBank(8, 4),),
    pd=sc.TLBBank(2),
    nested=sc.TLBBank(4, 2),
    host_pd=sc.TLBBank(2),
    replacement="plru",
)

MACHINES = {
    "cached-64-tlb": lambda: machine("cached", "64", sc.TLB(8, 2, 4, 2, 2, 2), vcpus=2, logged=True),
    "cached-pae": lambda: machine("cached", "pae"),
    "kvm-32": lambda: machine("kvm-2007", "32", logged=True),
    "flush-la57": lambda: machine("flush", "la57", sc.TLB(8, 2, 0, 1, 2, 1)),
    "cached-off": lambda: machine("cached", "off", vcpus=2),
    "unsync-64": lambda: lagging("64", vcpus=2),
    "unsync-32": lambda: lagging("32"),
    "unsync-pae-tlb": lambda: machine("unsync", "pae", sc.TLB(8, 2, 4, 2, 2, 2), vcpus=2, logged=True),
    "adaptive-64": lambda: machine("adaptive", "64", vcpus=2, logged=True),
    "backed-cached-64": lambda: backed("cached", "64", logged=True),
    "backed-unsync-pae": lambda: backed("unsync", "pae", tlb=sc.TLB(8, 2, 4, 2, 2, 2)),
    "nested-64-tlb": lambda: machine("nested", "64", PROCESSOR, vcpus=2),
    "native-64-tlb": lambda: machine("native", "64", sc.TLB(8, 2, 4, 2, 2, 2)),
}


def parts(path):
    """State and arrays of a saved machine."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    state = json.loads(str(arrays.pop("state")))
    del arrays["digest"]
    return state, arrays


def written(path, state, arrays):
    text = json.dumps(state)
    with open(path, "wb") as file:
        np.savez(file, state=np.array(text), digest=np.array(snapshot._digest(text, arrays)), **arrays)


# -- what is made odd ----------------------------------------------------------------------------------------


def leaves(value, where=()):
    """Paths of all that is in the state, the branches too."""
    if where:
        yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        if "counters" in where and 2 < key < len(value) - 1:
            continue  # they are all of one kind
        yield from leaves(each, (*where, key))


def put(state, where, value):
    for key in where[:-1]:
        state = state[key]
    state[where[-1]] = value


def get(state, where):
    for key in where:
        state = state[key]
    return state


def drop(state, where):
    for key in where[:-1]:
        state = state[key]
    del state[where[-1]]


ODD = (0, 1, -1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 4096, 0x7FFFFFFF, MANY, NONE - 1, NONE, 1 << 32, 1 << 40)
ODD += ((1 << 51), (1 << 52), (1 << 63), (1 << 64) - 1, 1 << 64, 1 << 70, 0.5, 1e300, float("nan"))
ODD += (None, True, False, "", "x", "cached", [], [0], {}, {"x": 1})


def of_state(state):
    """(label, change) for each oddity of the JSON text."""
    for where in leaves(state):
        value = get(state, where)
        label = ".".join(map(str, where))
        odd = list(ODD)
        if isinstance(value, int) and not isinstance(value, bool):
            odd += [value + 1, value - 1, value ^ 2, value * 2, -value, str(value), float(value), [value]]
            odd += [value ^ 1 << bit for bit in (4, 5, 7, 8, 10, 11, 12, 13, 16, 17, 20, 29, 31, 35, 46, 63)]
        if isinstance(value, list):
            odd += [value[:-1], value[1:], [*value, 0], value * 2, value * 40, value[::-1], [None] * len(value)]
        if isinstance(value, dict):
            odd += [{**value, "more": 1}, list(value), list(value.items())]
        for new in odd:
            if type(new) is not type(value) or new != value:
                yield f"{label} = {new!r:.40}", lambda s, a, w=where, n=new: put(s, w, copy.deepcopy(n))
        yield f"{label} gone", lambda s, a, w=where: drop(s, w)
    for one in range(len(state["vcpus"])):
        for first, second in (("cr0", "cr3"), ("cr3", "cr4"), ("cr4", "efer"), ("cr3", "cr2"), ("pdptes", "roots")):

            def swap(s, a, one=one, first=first, second=second):
                registers = s["vcpus"][one]
                registers[first], registers[second] = registers[second], registers[first]

            yield f"vcpus.{one} {first} and {second} swapped", swap
        for name, modes in (("efer", (0, 0x100, 0x500, 0xD00)), ("cr4", (0, 0x10, 0x20, 0x30, 0x1020))):
            for cr0 in (0x60000010, 0x80010011, 0x80000001):
                for value in modes:

                    def other(s, a, one=one, name=name, value=value, cr0=cr0):
                        s["vcpus"][one].update({name: value, "cr0": cr0})

                    yield f"vcpus.{one} of another mode: {name} {value:#x}, cr0 {cr0:#x}", other
    for size in (PAGE, 1 << 30, 1 << 40, 1 << 46, 1 << 47, 1 << 52):
        yield f"memory of {size:#x}", lambda s, a, n=size: s.update(memory=n, slots=[[0, n]], logged=[])
        yield (
            f"a second slot of {size:#x}",
            lambda s, a, n=size: s.update(memory=s["memory"] + n, slots=[*s["slots"], [1 << 47, n]]),
        )
    for pages in (4, 15, 17, 1 << 16, (1 << 22) - 1, 1 << 22, 1 << 40):
        yield f"pool of {pages}", lambda s, a, n=pages: s["design"].update(pool_pages=n)
    yield (
        "another kind",
        lambda s, a: s["design"].update(kind="Native" if s["design"]["kind"] == "Shadow" else "Shadow"),
    )
    yield "native", lambda s, a: s.update(design={"kind": "Native", "name": "native"})


def of_arrays(arrays):
    """(label, change) for each oddity of a whole array."""
    for name, array in arrays.items():
        flat = array.reshape(-1)
        made = {
            "zeros": np.zeros_like(array),
            "ones": np.ones_like(array),
            "all bits": np.full_like(array, ~array.dtype.type(0)),
            "too short": array[:-1],
            "too long": np.concatenate((array, array[-1:])) if len(array) else np.zeros((1, *array.shape[1:]), "u8"),
            "empty": array[:0],
            "twice": np.concatenate((array, array)),
            "backwards": array[::-1].copy(),
            "moved by one": np.roll(flat, 1).reshape(array.shape),
            "moved by a row": np.roll(array, 1, axis=0) if len(array) else array,
            "floats": array.astype("f8"),
            "signed": array.view(array.dtype.str.replace("u", "i")),
            "wider": array.astype("u8") if array.dtype.itemsize == 1 else array.astype("u4"),
            "other order": array.astype(array.dtype.newbyteorder(">")),
            "text": np.array("x" * 10),
            "texts": array.astype("U"),
            "bools": array.astype(bool),
            "one number": np.array(0, array.dtype),
            "a dimension more": array[None],
            "flat": flat,
            "turned": array.T,
            "by columns": np.asfortranarray(array) if array.ndim > 1 else array[None].T,
            "structured": np.zeros(len(array), [("x", "u1"), ("y", "<u8")]),
            "huge": np.zeros((1 << 22,), array.dtype),
            "half shape": flat[: flat.size // 2 * 2].reshape(2, -1),
        }
        for what, new in made.items():
            yield f"{name} {what}", lambda s, a, n=name, v=new: a.update({n: v})
        yield f"{name} gone", lambda s, a, n=name: a.pop(n)
        yield f"{name} by another name", lambda s, a, n=name: a.update({n + "x": a.pop(n)})
        for other in arrays:
            if other > name:
                yield f"{name} and {other} swapped", lambda s, a, n=name, o=other: a.update({n: a[o], o: a[n]})
    yield "one array more", lambda s, a: a.update(more=np.zeros(3))


def store(array, dtype, index, field, value):
    """A change of one number in an array whose bytes are records of `dtype`."""

    def change(s, a):
        copied = a[array].copy()
        records = copied.reshape(-1).view(dtype)
        target = records[field] if field else records
        if target.dtype.kind == "i":
            target = target.view(f"u{target.itemsize}")
        target[index] = value
        a[array] = copied

    return change


def of_elements(arrays):
    """(label, change) for single numbers: those in use, with values around every limit."""
    limits = (0, 1, 2, POOL - 1, POOL, POOL + 1, 511, 512, POOL * 512 - 1, POOL * 512, POOL * 512 + 1, RAM // PAGE)
    limits += (0x7FFFFFFF, MANY, MANY + 1, MANY + POOL * 512, NONE - 1, NONE, 1 << 40, (1 << 64) - 1)
    dtypes = {name: np.dtype(dtype) for name, dtype in (FIELDS | SINGLE).items()}
    for name in arrays:
        if name.startswith("tlb_"):
            dtypes[name] = TLB_HEADER if name.endswith("_0") else TLB_ENTRY
    for name, array in arrays.items():
        if name in ("ram", "ram_frame") or name.startswith("log_"):
            continue
        dtype = dtypes[name]
        records = array.reshape(-1).view(dtype)
        used = np.flatnonzero(array.reshape(len(records), -1).any(axis=1)).tolist()
        unused = sorted(set(range(len(records))) - set(used))
        chosen = [*used[:4], *used[4:-2:11], *used[-1:], *unused[:1], *unused[-1:]]
        for field in dtype.names or (None,):
            if field == "pad":
                continue
            for index in dict.fromkeys(chosen):
                old = records[index] if field is None else records[field][index]
                places = [(index, n) for n in (0, 1, len(old) - 1)] if np.ndim(old) else [index]
                for place in places:
                    old = int(records[place] if field is None else records[field][place])
                    width = 8 * (dtype if field is None else dtype[field].base).itemsize
                    odd = (*limits, old + 1, old - 1, old ^ MANY, *(old ^ 1 << bit for bit in range(0, 64, 7)))
                    for value in sorted({value & (1 << width) - 1 for value in odd} - {old}):
                        label = f"{name}[{place}]{'.' + field if field else ''} = {value:#x}"
                        yield label, store(name, dtype, place, field, value)
    for value in (0, 1, RAM // PAGE - 1, RAM // PAGE, 1 << 32, (1 << 64) - 1):
        for index in (0, -1):
            yield f"ram_frame[{index}] = {value:#x}", store("ram_frame", np.dtype("<u8"), index, None, value)


def forgeries(state, arrays):
    """All of them, in an order that is always the same."""
    yield from of_state(state)
    yield from of_arrays(arrays)
    yield from of_elements(arrays)


# -- the program ---------------------------------------------------------------------------------------------

SECONDS = 5


def load(path):
    """What comes of loading a file: the name of an error that may come, or "loaded"."""
    signal.alarm(SECONDS)
    try:
        vm = sc.VM.load(path)
    except (sc.SnapshotError, sc.TraceError, sc.ConfigError) as error:
        return type(error).__name__ if str(path) in str(error) else f"{error!r} without its file"
    finally:
        signal.alarm(0)
    vm.audit(strict=True)
    signal.alarm(SECONDS)
    use_up(vm)
    signal.alarm(0)
    return "loaded"


def main(name, first, step):
    """Load every `step`-th forgery of the machine `name` from number `first` on."""
    path = Path(tempfile.mkdtemp()) / "vm"
    MACHINES[name]().save(path)
    base, sound = parts(path)
    counted = {}
    began = time.perf_counter()
    for label, change in list(forgeries(base, sound))[first::step]:
        state, arrays = copy.deepcopy(base), dict(sound)
        change(state, arrays)
        written(path, state, arrays)
        print(f"loading {name}: {label}", flush=True)
        came = load(path)
        counted[came] = counted.get(came, 0) + 1
    path.unlink()
    path.parent.rmdir()
    print(f"done {counted} in {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
