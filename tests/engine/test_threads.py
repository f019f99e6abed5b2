"""Independent VMs in threads: each does its own work, as if alone, and none holds the GIL while it does."""

import threading

import numpy as np

import shadowcore as sc

THREADS = 4
PAGE = 4096
DATA = 0x20_0000
CHUNK = 4096
"""Operations after which a batch looks for Ctrl-C, with the GIL."""


def machine(seed, pages=512):
    """A VM with `pages` mapped at 0, and a batch of stores, loads and context switches that differs by seed."""
    vm = sc.VM(memory="8MiB", mmu=sc.Shadow.cached(pool_pages=16))
    frames = iter(range(256, 512))
    spaces = [sc.PageTables(vm.memory, "64", allocate=lambda: next(frames)) for _ in range(3)]
    for tables in spaces:
        tables.map(0, DATA, pages * PAGE, "rwu", page_size=PAGE, accessed=True, dirty=seed % 2 == 0)
    for name, value in spaces[0].registers.items():
        setattr(vm.vcpus[0], name, value)
    rng = np.random.default_rng(seed)
    ops = np.zeros(20_000 + 1000 * seed, dtype=sc.OP_DTYPE)
    ops["op"] = rng.choice([sc.Op.READ, sc.Op.WRITE, sc.Op.CR3], len(ops), p=[0.6, 0.39, 0.01])
    ops["user"], ops["size"] = 1, 8
    ops["addr"] = rng.integers(0, pages * PAGE // 8, len(ops)) * 8
    ops["value"] = rng.integers(0, 1 << 62, len(ops))
    switch = ops["op"] == sc.Op.CR3
    ops["value"][switch] = rng.choice([tables.cr3 for tables in spaces], switch.sum())
    return vm, ops


def in_threads(functions):
    """Run them at once, each in a thread; what they raised comes out."""
    errors = []
    barrier = threading.Barrier(len(functions))

    def run(function):
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_each_does_its_work_as_if_alone():
    """Counters, results, memory and shadow tables are those of the same batches one after the other."""
    alone, together = [machine(i) for i in range(THREADS)], [machine(i) for i in range(THREADS)]
    expected = [[vm.vcpus[0].run(ops) for _ in range(5)] for vm, ops in alone]
    found = [[] for _ in together]

    def work(i):
        vm, ops = together[i]
        for _ in range(5):
            found[i].append(vm.vcpus[0].run(ops))

    in_threads([lambda i=i: work(i) for i in range(THREADS)])
    for i, (results, wanted) in enumerate(zip(found, expected, strict=True)):
        for result, other in zip(results, wanted, strict=True):
            assert result.stats.as_dict() == other.stats.as_dict()
            for name in ("outcome", "error_code", "gpa", "value", "exits", "emulated"):
                assert (getattr(result, name) == getattr(other, name)).all()
        (vm, ops), (reference, _) = together[i], alone[i]
        assert vm.stats.as_dict() == reference.stats.as_dict()
        assert vm.stats.accesses == 5 * int((ops["op"] != sc.Op.CR3).sum())
        assert vm.stats.exits["cr3"] == 5 * int((ops["op"] == sc.Op.CR3).sum()) + 1
        assert vm.stats.exits["fill"] > 0
        assert (vm.memory.bytes == reference.memory.bytes).all()
        assert (vm.mmu.arrays["table"] == reference.mmu.arrays["table"]).all()
        assert vm.audit().ok
    # They were different work: no VM counted for another.
    assert len({str(vm.stats.as_dict()) for vm, _ in together}) == THREADS


def counting(seed=0, length=40 * CHUNK):
    """A VM, and a batch whose stores count 1, 2, 3 ... in the guest's first word of data: it shows how far it is."""
    vm, _ = machine(seed, pages=1)
    ops = np.zeros(length, dtype=sc.OP_DTYPE)
    ops["op"], ops["user"], ops["size"] = sc.Op.WRITE, 1, 8
    ops["value"] = np.arange(1, length + 1)
    return vm, ops


def test_python_runs_in_the_middle_of_a_batch():
    """While a batch runs, this thread sees its stores come in, and not only where the batch lets others run."""
    vm, ops = counting()
    word = vm.memory.words[DATA // 8 : DATA // 8 + 1]
    seen = set()
    for _ in range(500):
        word[0] = 0
        thread = threading.Thread(target=vm.vcpus[0].run, args=(ops,))
        thread.start()
        while thread.is_alive():
            seen.add(int(word[0]))
        thread.join()
        assert word[0] == len(ops)
        if any(value % CHUNK for value in seen):
            break
    assert any(value % CHUNK for value in seen)


def test_batches_of_several_vms_are_under_way_at_once():
    """Every thread is in the middle of its batch when the callbacks of all of them meet."""
    barrier = threading.Barrier(THREADS, timeout=60)
    met = []

    def meet(gva, gpa, nbytes):
        met.append((threading.get_ident(), barrier.wait()))
        return True

    vms = []
    for i in range(THREADS):
        vm, ops = counting(i, length=1000)
        tables = sc.PageTables(vm.memory, "64", allocate=range(600, 700), root=vm.vcpus[0].cr3)
        tables.map(1 << 30, tables.root, PAGE, "rwu", accessed=True, dirty=True)
        ops["addr"][500] = (1 << 30) + 8 * 300  # a store to an entry of the root that is not in use
        ops["value"][500] = 0
        vm.mmu.can_emulate = meet
        vms.append((vm, ops))
    in_threads([lambda vm=vm, ops=ops: vm.vcpus[0].run(ops) for vm, ops in vms])
    assert sorted(place for _, place in met) == list(range(THREADS))
    assert len({thread for thread, _ in met}) == THREADS
    for vm, ops in vms:
        assert vm.memory.words[DATA // 8] == len(ops)
        assert vm.stats.pf_emulate == vm.stats.exits["emulate"] == 1
        assert vm.stats.accesses == len(ops)
