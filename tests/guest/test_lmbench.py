"""What the workloads of lmbench, and the kernel build, count: by call, by fault, by process."""

import collections

import numpy as np
import pytest

import shadowcore as sc
from shadowcore.workload import WORKLOADS, Guest

KPTI = {"isolation": True, "pcid": True}


def counted(name, mmu="unsync", options=None, rounds=3, parameters=None, warm=3):
    """Counters of the engine and of the guest, of one of `rounds` rounds after `warm` that are not counted."""
    workload = WORKLOADS[name]
    vm = sc.VM(workload.memory, mmu, host_page_size="2MiB")
    kernel = sc.Kernel(vm, sc.KernelOptions(**(workload.options | (options or {}))))
    steps = workload.function(Guest(kernel, np.random.default_rng(0)), **workload.checked(parameters or {}))
    for _ in range(1 + warm):
        next(steps)
    before = collections.Counter(vm.stats.as_dict() | {f"guest_{k}": n for k, n in kernel.counters.items()})
    for _ in range(rounds):
        next(steps)
    after = collections.Counter(vm.stats.as_dict() | {f"guest_{k}": n for k, n in kernel.counters.items()})
    after.subtract(before)
    return {name: count / rounds for name, count in after.items()}


@pytest.mark.parametrize("mmu", ["flush", "cached", "unsync", "kvm-6.1"])
@pytest.mark.parametrize("pcid", [False, True])
def test_a_system_call_takes_two_cr3_exits_under_isolation_and_none_without(mmu, pcid):
    with_it = counted("syscall", mmu, {"isolation": True, "pcid": pcid})
    assert with_it["guest_syscalls"] == 1000
    assert with_it["exits_cr3"] == 2000
    if mmu != "flush":  # which loses the kernel's pages at each load
        assert with_it["exits_total"] == 2000
    without = counted("syscall", mmu, {"pcid": pcid})
    assert without["guest_syscalls"] == 1000
    assert without["exits_total"] == 0


def test_a_round_trip_is_two_switches():
    n = counted("context-switch")
    assert (n["guest_switches"], n["exits_total"], n["exits_cr3"]) == (200, 200, 200)
    n = counted("context-switch", options={"isolation": True})
    assert (n["guest_switches"], n["exits_cr3"]) == (200, 600)


@pytest.mark.parametrize(("options", "loads"), [({}, 0), (KPTI, 400)])
def test_a_protection_fault_is_reflected(options, loads):
    """And sigreturn enters the kernel once more: four loads under isolation."""
    n = counted("lmbench-prot-fault", options=options)
    assert n["guest_faults"] == n["guest_faults_segv"] == n["exits_guest"] == 100
    assert n["exits_cr3"] == loads
    assert n["exits_total"] == 100 + loads


@pytest.mark.parametrize("written", [0, 5])
def test_what_a_fork_copies(written):
    """Each page that either side writes loses W in the fork; one side copies it, the other keeps the frame."""
    n = counted("lmbench-fork", parameters={"written": written})
    assert n["guest_forks"] == n["guest_exits"] == n["guest_roots_made"] == 1
    assert n["guest_write_protects"] == n["guest_faults_copied"] == n["guest_faults_reused"] == written + 1
    assert n["guest_faults"] == n["exits_guest"] == 2 * (written + 1) + 5  # five stretches of the child's code
    assert n["exits_emulate"] == n["pf_emulate"] > 0
    assert n["exits_fill"] + n["exits_write"] >= n["guest_faults"]
    assert n["exits_total"] == sum(
        n[f"exits_{each}"] for each in ("fill", "write", "emulate", "guest", "cr3", "invlpg")
    )


def test_exec_and_sh_take_what_is_said_of_them():
    fork, exec_, sh = (counted(f"lmbench-{name}")["guest_faults"] for name in ("fork", "exec", "sh"))
    assert exec_ - fork == pytest.approx(60, abs=5)
    assert sh - exec_ == pytest.approx(205, abs=10)
    assert counted("lmbench-sh")["guest_execs"] == 2


@pytest.mark.parametrize("around", [1, 16])
def test_a_fault_maps_what_lies_around_it(around):
    """One fault for each window; the shadow of eight pages is filled at once."""
    n = counted("lmbench-page-fault", options={"fault_around": around})
    assert n["guest_faults"] == n["guest_faults_file"] == n["exits_guest"] == 1024 // around
    assert n["exits_fill"] == 128 if around == 16 else n["exits_fill"] > 500
    assert n["guest_leaf_installs"] == n["guest_leaf_clears"] == 1024


def test_stores_to_a_mapped_file():
    n = counted("lmbench-mmap")
    assert n["guest_faults"] == n["exits_guest"] == n["exits_fill"] == 16384 // 40
    assert n["guest_faults_around"] == 0


def test_a_build_has_the_faults_and_processes_that_were_counted():
    """Linux 4.13: 31,486,712 minor faults, 29,135 processes."""
    n = counted("kbuild", "native", rounds=1, warm=1, parameters={"work": 0})
    assert n["guest_execs"] == n["guest_forks"] == 10
    assert n["guest_faults"] / n["guest_exits"] == pytest.approx(31_486_712 / 29_135, rel=0.05)
    with pytest.raises(sc.ConfigError, match="kbuild: heap"):
        sc.workload.run("kbuild", "native", heap=40_000, operations=1)
