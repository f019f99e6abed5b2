"""Workloads: the same under every design, repeatable, refused where they cannot be, and like a real Linux guest."""

import json

import numpy as np
import pytest
from commands import refused, run
from places import LINUX_FORK, ROOT

import shadowcore as sc
from shadowcore import workload
from shadowcore.cli import workload as cli_workload
from shadowcore.workload import WORKLOADS
from shadowcore.workload import rates as calibration

SMALL = {
    "pingpong": {"processes": 3, "touches": 64},
    "hackbench": {"touches": 8},
    "fork-storm": {"pages": 40, "children": 3, "written": 10},
    "shell": {"work": 200},
    "compile": {"work": 2000, "heap": 100, "text": 200},
    "webserver": {"workers": 4, "shared": 700, "touches": 32, "requests": 2},
    "database": {"pages": 900, "index": 100},
    "analytics": {"large": 2},
    "demand": {"pages": 600, "touches": 4},
    "page-fault": {"pages": 600},
    "parallel-fault": {"pages": 600},
    "fault-scaling": {"pages": 600},
    "unmap-scaling": {"pages": 600},
    "syscall": {"calls": 50},
    "context-switch": {"trips": 20},
    "lmbench-fork": {},
    "lmbench-exec": {},
    "lmbench-sh": {},
    "fork-exec": {"parent": 100},
    "lmbench-prot-fault": {"faults": 20},
    "lmbench-page-fault": {"pages": 200},
    "lmbench-mmap": {"pages": 2000},
    "kbuild": {"tools": 2, "heap": 300, "headers": 64, "assembler": 60, "syscalls": 20, "work": 300},
    "ageing": {"processes": 2, "pages": 600, "hot": 60, "touches": 500},
    "kbuild-like": {"work": 2000, "heap": 100, "text": 200},
    "idle": {"ticks": 20},
}
PROCESSES = {"lmbench-fork", "lmbench-exec", "lmbench-sh", "fork-exec", "kbuild"}
FORKING = {"hackbench", "fork-storm", "shell", "compile", "webserver", "kbuild-like"} | PROCESSES
QUIET = {"pingpong", "database", "analytics", "idle", "syscall", "context-switch"}
"""No page faults once they are set up."""
REFUSED = {"lmbench-prot-fault"}
"""Faults that the kernel gives back to the process."""


def small(name, mmu="cached", **more):
    return workload.run(name, mmu, **({"operations": 30_000} | SMALL[name] | more))


def test_every_workload_is_tested():
    assert set(SMALL) == set(WORKLOADS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_under_every_design(name):
    results = {}
    for mmu in ("native", "flush", "cached", sc.Shadow.cached(pool_pages=16, flood_threshold=None)):
        results[repr(mmu)] = small(name, mmu, audit_every=10_000)
    assert len({result.history for result in results.values()}) == 1
    native, flush, cached, _ = results.values()
    assert native.counters == flush.counters == cached.counters
    assert native.stats["exits_total"] == 0
    assert (cached.counters["faults_segv"] > 0) == (name in REFUSED)
    assert cached.counters["pipe_blocked"] == 0
    assert cached.operations >= 30_000
    assert (cached.counters["faults"] == 0) == (name in QUIET)
    # Setup may fork as well; what a run forks is in the counters of the work.
    if name in FORKING - {"hackbench", "webserver"}:
        assert cached.counters["forks"] > 0
        assert cached.stats["mmu_flooded"] > 0 or name == "lmbench-fork"
    if name == "pingpong":
        assert flush.stats["exits_fill"] > 10 * cached.stats["exits_fill"]


@pytest.mark.parametrize("how", [{"drift": 0}, {"ahead": 200}, {"drift": 1}], ids=repr)
def test_threads_do_the_same_under_every_design(how):
    options = sc.KernelOptions(isolation=True, pcid=True)
    results = [
        small("parallel-fault", mmu, vcpus=3, **how, tlb=sc.TLB(), options=options, audit_every=10_000)
        for mmu in ("native", "flush", "cached")
    ]
    assert len({result.history for result in results}) == 1
    assert results[0].counters["shootdowns"] > 0
    with pytest.raises(sc.ConfigError, match="a recording is of one processor"):
        small("parallel-fault", vcpus=2, record=True)
    for given in ({"vcpus": 2}, {"host_page_size": 4096}, {"tlb": sc.TLB()}):
        with pytest.raises(sc.ConfigError, match=next(iter(given))):
            workload.run("page-fault", sc.VM(), **given)


@pytest.mark.parametrize("mode", ["32", "pae", "la57"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_in_other_modes(name, mode):
    options = sc.KernelOptions(mode=mode)
    designs = ("native", "cached", "unsync")
    first, *others = (small(name, mmu, operations=8000, options=options) for mmu in designs)
    for other in others:
        assert first.history == other.history
        assert (other.counters["faults_segv"] > 0) == (name in REFUSED)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_seed_decides(name):
    first, again, other = (small(name, "native", seed=seed, operations=5000) for seed in (3, 3, 4))
    assert (first.history, first.counters, first.operations) == (again.history, again.counters, again.operations)
    assert first.history != other.history


@pytest.mark.parametrize("options", [{"isolation": True}, {"pcid": True}, {"isolation": True, "pcid": True}])
def test_with_isolation_and_pcids(options):
    made = sc.KernelOptions(**options)
    results = [small("shell", mmu, options=made, audit_every=10_000) for mmu in ("native", "flush", "cached", "unsync")]
    assert len({result.history for result in results}) == 1
    plain = small("shell", "native")
    more = results[0].counters["cr3_loads"] > 2 * plain.counters["cr3_loads"]
    assert more is bool(options.get("isolation"))


@pytest.mark.parametrize("name", ["shell", "demand", "ageing", "analytics"])
def test_a_recorded_workload_repeats_itself(name):
    recorded = small(name, "native", record=True, operations=5000)
    ops = recorded.recording
    assert ops.dtype == sc.OP_DTYPE
    needed = WORKLOADS[name]
    memory = []
    for mmu in ("native", "cached", "unsync"):
        vm = sc.VM(needed.memory, mmu=mmu)
        sc.Kernel(vm, sc.KernelOptions(**needed.options))
        result = vm.vcpus[0].run(ops)
        assert set(np.unique(result.outcome)) <= {0, 1}
        memory.append(vm.memory.bytes.copy())
        vm.audit(strict=True)
    assert (memory[0] == memory[1]).all()
    assert recorded.history == small(name, "native", operations=5000).history
    assert small(name, "native", operations=0).recording is None


def test_a_machine_of_ones_own():
    vm = sc.VM("64MiB", mmu=sc.Shadow.cached(pool_pages=64), tlb=sc.TLB())
    calls = []
    result = workload.run(
        "pingpong", vm, operations=20_000, touches=100, progress=lambda done, total: calls.append((done, total))
    )
    assert result.stats["tlb_hits"] > 0
    assert result.design == "cached"
    assert calls[-1] == (20_000, 20_000)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert "recording" not in json.loads(json.dumps(result.as_dict()))
    assert result.operations_per_second > 0
    with pytest.raises(sc.ConfigError, match="paging on"):
        workload.run("pingpong", vm)
    with pytest.raises(sc.GuestOutOfMemory):
        workload.run("database", sc.VM("16MiB"))


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("did you mean 'pingpong'", {"name": "pingpon"}),
        ("there are pingpong, hackbench", {"name": "xyz"}),
        ("pingpong: there is no parameter 'page'; its parameters: processes, pages, touches", {"page": 3}),
        ("pingpong: pages: 0 is not within 1 to 4096", {"pages": 0}),
        ("pingpong: pages: an integer is needed", {"pages": "many"}),
        ("operations", {"operations": -1}),
        ("seed", {"seed": 1 << 64}),
        ("options", {"options": {}}),
        ("audit_every", {"audit_every": -1}),
        ("mmu", {"vm": "cashed"}),
        ("index", {"name": "database", "pages": 100, "index": 200}),
        ("dirty", {"name": "shell", "dirty": 200}),
        ("at most 939524096", {"vm": sc.VM("1GiB"), "options": sc.KernelOptions(mode="32")}),
    ],
)
def test_bad_parameters(match, arguments):
    with pytest.raises(sc.ConfigError, match=match):
        workload.run(**({"name": "pingpong"} | arguments))


@pytest.fixture(scope="module")
def recording():
    return sc.trace.load(LINUX_FORK)


def test_calibration_counts_what_the_recording_says(recording):
    """The vectorized counts against a loop over the records, one after the other."""
    part = recording.head(recording.first_user + 60_000)
    counts = calibration.recording_counts(part)
    entry = {}
    found = dict.fromkeys(("table_stores", "leaf_installs", "leaf_clears", "write_protects", "reuses"), 0)
    snapshot = part.snapshot
    arrays = (part.kind.tolist(), part.flags.tolist(), part.addr.tolist(), part.value.tolist())
    for i, (kind, flags, addr, value) in enumerate(zip(*arrays, strict=True)):
        if kind == 4:
            for index in range(512):
                entry.pop((addr >> 3) + index, None)
        if kind != 3:
            continue
        old, entry[addr >> 3] = entry.get(addr >> 3, 0), value
        late = flags & 128 and not snapshot[i]
        kernel_half = snapshot[i] and flags & 7 == 4 and addr & 0xFFF >= 2048
        if i < part.first_user or late or kernel_half:
            continue
        found["table_stores"] += 1
        if flags & 7 == 1:
            found["leaf_installs"] += not old & 1 and value & 1
            found["leaf_clears"] += old & 1 and not value & 1
            found["write_protects"] += bool(old & 1 and value & 1 and old & 2 and not value & 2)
            found["reuses"] += bool(old & 1 and value & 1 and not old & 2 and value & 2)
    assert {name: counts[name] for name in found} == found
    assert found["write_protects"] > 0


def test_the_shell_is_like_the_linux_guest_that_it_is_calibrated_by():
    rows = workload.calibration((str(LINUX_FORK),), spaces=60)
    assert len(rows) == len(calibration.PER_SPACE) + len(calibration.PER_MILLION)
    for row in rows:
        if row.linux:
            assert 0.75 < row.ratio < 1.3, row
        else:
            assert row.model == 0


def test_a_recording_without_a_workload_cannot_calibrate(recording, tmp_path):
    path = tmp_path / "boot.npz"
    recording.head(1000).save(path)
    with pytest.raises(sc.TraceError, match="user-mode access expected"):
        workload.calibration((str(path),))


def test_commands():
    assert [line.split()[0] for line in run("workloads").splitlines()] == list(WORKLOADS)
    one = run("workloads", "shell")
    for parameter in WORKLOADS["shell"].parameters:
        assert parameter in one
    plain = json.loads(run("workloads", "--json"))
    assert plain["pingpong"]["parameters"]["pages"]["default"] == 16
    assert "did you mean" in refused("workloads", "shel")
    assert "--spaces" in refused("calibration", "--spaces", 8)
    assert "linux-fork, per address space" in run("calibration", LINUX_FORK, "--spaces", 8)
    assert all(command.help for command in cli_workload.COMMANDS)
    plain = json.loads(run("calibration", LINUX_FORK, "--spaces", 8, "--json"))
    assert plain[0]["recording"] == "linux-fork"


DOCUMENT = ROOT / "docs" / "workloads.md"


def test_the_document_says_what_there_is():
    text = DOCUMENT.read_text("utf-8")
    for name, what in WORKLOADS.items():
        section = text.split(f"\n### {name}\n")[1].split("\n### ")[0]
        assert what.summary in section
        assert f"Memory: {what.memory}." in section
        for key, parameter in what.parameters.items():
            assert f"| `{key}` | {parameter.default:,} | {parameter.low:,} to {parameter.high:,} |" in section
