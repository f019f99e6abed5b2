"""The recording linux-fork, as it was run on the real KVM of Linux 6.1 and 6.12: exits of each of 1,210,763 operations,
totals of the counters, and the shadow pages at nine checkpoints."""

import importlib.util
import json

import numpy as np
import pytest
from kvm_files import FEATURES, POKE, kvm_role
from places import LINUX_FORK, ROOT

import shadowcore as sc

FOLDER = ROOT / "tests" / "data" / "kvm-6.1" / "recording"
SUPPORT = 0xFFFFF00000000000
FIELDS = ("gfn", "role", "root_count", "unsync_children", "flood", "unsync")


@pytest.fixture(scope="module")
def operations():
    """What convert.py makes of the recording."""
    spec = importlib.util.spec_from_file_location("convert", FOLDER / "convert.py")
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    with np.load(LINUX_FORK) as recording:
        return convert.convert(recording)


def accesses(ops):
    """The accesses of all operations, and where those of each begin: the fetch, user mode's fetch, the access or the
    register load, the fetch of what follows. (FORMAT.md, section 5)"""
    kind, user = ops["op"], ops["user"].astype(int)
    start = np.concatenate([[0], np.cumsum(np.where(kind == POKE, 0, 3 + ((kind <= 1) & (user == 1))))])
    made = np.zeros(start[-1], sc.OP_DTYPE)
    made["op"], made["size"], made["addr"] = sc.Op.FETCH, 1, SUPPORT + 4096
    from_user = np.flatnonzero((kind <= 1) & (user == 1))
    made["addr"][start[from_user] + 1], made["user"][start[from_user] + 1] = SUPPORT, 1
    own = np.flatnonzero(kind != POKE)
    at = start[own] + 1 + np.where(kind[own] <= 1, user[own], 0)
    for name in ("op", "user", "size", "addr", "value"):
        made[name][at] = ops[name][own]
    return made, start


@pytest.mark.parametrize("design", ["kvm-6.1", pytest.param("kvm-6.12", marks=pytest.mark.slow)])
def test_every_exit(operations, design):
    with np.load(FOLDER / "linux-fork.npz") as z:
        wanted = {name: z[name] for name in ("cnt", "cnt_6_12", "cnt_6_12_op", "ckpt_op", "pages")}
        info = json.loads(str(z["info"]))
    counts = wanted["cnt"].astype(int)
    if design == "kvm-6.12":
        counts[wanted["cnt_6_12_op"]] = wanted["cnt_6_12"]
    ops = operations["ops"]
    vm = sc.VM(info["nframes"] * 4096, sc.config.design(design, pool_pages=info["nr_mmu_pages"]), features=FEATURES)
    vm.memory.bytes.reshape(-1, 4096)[operations["mem_gfn"]] = operations["mem_page"]
    cpu = vm.vcpus[0]
    cpu.efer, cpu.cr4, cpu.cr3 = int(operations["efer"]) & ~(1 << 10), int(operations["cr4"]), int(operations["cr3"])
    cpu.cr0, cpu.ac = int(operations["cr0"]), True
    vm.mmu.zap_all()
    cpu.cr3 = cpu.cr3  # what the loads have left is gone; the root is in place before the first operation
    vm.stats.reset()
    made, start = accesses(ops)
    owner = np.repeat(np.arange(len(ops)), np.diff(start))
    exits, done = np.zeros(len(ops), int), 0
    checkpoints = {int(op) + 1: number for number, op in enumerate(wanted["ckpt_op"])}
    for end in sorted({*np.flatnonzero(ops["op"] == POKE).tolist(), *checkpoints, len(ops)}):
        if start[end] > start[done]:
            result = cpu.run(made[start[done] : start[end]])
            assert not result.outcome.any()
            exits += np.bincount(owner[start[done] : start[end]], result.exits, minlength=len(ops)).astype(int)
        done = end
        if end in checkpoints and design == "kvm-6.1":
            headers = vm.mmu.arrays["pages"][vm.mmu.pages["page"]]
            found = [(int(h["gfn"]), kvm_role(int(h["role"])), *(int(h[name]) for name in FIELDS[2:])) for h in headers]
            rows = wanted["pages"][wanted["pages"]["ckpt"] == checkpoints[end]]
            assert found == [tuple(int(row[name]) for name in FIELDS) for row in rows]
        if end < len(ops) and ops["op"][end] == POKE:
            vm.memory.words[int(ops["addr"][end]) >> 3] = ops["value"][end]
    assert (exits == counts[:, 0]).all()
    totals = {name: int(counts[:, i].sum()) for i, name in enumerate(info["counters"])}
    totals["mmu_cache_miss"] -= 1  # the root, see above
    early = {name: getattr(vm.stats, name) for name in totals}
    if design == "kvm-6.12":
        early.pop("tlb_flush"), totals.pop("tlb_flush")  # a new vcpu begins with one: here before the first operation
    assert early == totals
