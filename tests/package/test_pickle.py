"""Errors and results go through pickle and copy: from a process of a pool to its parent, into a cache."""

import concurrent.futures
import copy
import dataclasses
import functools
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil

import numpy as np
import pytest
from operations import operations
from places import DATA
from sources import operations as made_operations

import shadowcore as sc
from shadowcore.engine.audit import AuditReport, Violation
from shadowcore.engine.presets import PRESETS
from shadowcore.guest import process
from shadowcore.programs.survey import Fold
from shadowcore.recording import operations as replayed
from shadowcore.recording import replay as trace
from shadowcore.recording.guest import RecordingFile
from shadowcore.recordings import Event, Writer
from shadowcore.studies import evolution, explain, host, images, reproduction
from shadowcore.studies import study as studies
from shadowcore.studies.choice import Choice
from shadowcore.studies.pools import pool_study
from shadowcore.studies.validity import Row, Validity

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
WAYS = [pytest.param(lambda made, p=p: pickle.loads(pickle.dumps(made, p)), id=f"protocol {p}") for p in PROTOCOLS]
WAYS += [pytest.param(copy.copy, id="copy"), pytest.param(copy.deepcopy, id="deepcopy")]
every_way = pytest.mark.parametrize("way", WAYS)


def modules():
    yield sc
    for found in pkgutil.walk_packages(sc.__path__, "shadowcore."):
        try:
            yield importlib.import_module(found.name)
        except ImportError:  # an extra that is not installed
            continue


def classes(wanted):
    """Classes of the package that `wanted` is true of, each once, by name."""
    found = {}
    for module in modules():
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__.startswith("shadowcore") and wanted(kind):
                found[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return dict(sorted(found.items()))


def machine(**settings):
    """A VM whose vcpu 0 has 16 pages from 0x400000 on; where they lead to from 0x408000 on there is no memory."""
    vm = sc.VM("1MiB", "cached", **settings)
    tables = sc.PageTables(vm.memory, mode="64", allocate=range(100, 150))
    tables.map(0x400000, 0x1000, 0x8000, "rw")
    tables.map(0x408000, 0x200000, 0x8000, "rw")
    for name, value in tables.registers.items():
        setattr(vm.vcpus[0], name, value)
    return vm


def a_run(data=True, size=8):
    found = [(1, 0x400000, size), (0, 0x400000, size), (0, 0x900000, 8), (0, 0x408000, 8), (2, 0x401000, 1), (7, 0, 1)]
    rows = [(op, addr, 0x1234567890 + i, size) for i, (op, addr, size) in enumerate(found * 3)]
    return machine().vcpus[0].run(operations(*rows), data=data)


def a_log():
    vm = machine()
    with vm.record_exits() as log:
        vm.vcpus[0].read(0x400000)
    return log


def same(a, b):
    """Are two results equal in all that they show?"""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, BaseException):
        return str(a) == str(b) and same(a.args, b.args) and same(vars(a), vars(b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    if isinstance(a, sc.RunResult):
        names = ("outcome", "error_code", "gpa", "value", "value_high", "exits", "emulated", "stats")
        return len(a) == len(b) and all(same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, RecordingFile):
        return all(getattr(b, name) == value for name, value in vars(a).items() if not name.startswith("_"))
    if isinstance(a, sc.Stats):
        return a.as_dict() == b.as_dict()
    if isinstance(a, sc.Translation):
        names = ("gpa", "page_size", "writable", "user", "executable", "entry", "level", "levels")
        return all(getattr(a, name) == getattr(b, name) for name in names)
    if isinstance(a, sc.ExitLog):
        return a.closed == b.closed and same(a.rows, b.rows)
    return a == b


# ------------------------------------------------------------------------------------------------------------- errors

ERRORS = classes(lambda kind: issubclass(kind, BaseException))
# By parameter of a class; another parameter than these is a case to add.
ARGUMENTS = {
    "file": "a.screc",
    "record": 7,
    "expected": "something else",
    "unit": "line",
    "needed": 5,
    "had": 4,
    "roots": (1, 0x20),
    "violations": (Violation("I1", "what", 1, 2, 3), Violation("I2", "what", None, 0, 0)),
    "count": 12,
    "point": "post-fault",
    "result": a_run,
    "plugin": "mine",
    "what": "KeyError: 3",
    "address": 0x1234,
    "error_code": 6,
    "gpa": 0xFEE00000,
    "vector": 14,
    "code": 2,
    "study": lambda: some_study(),
    "sweep": lambda: RESULTS["Sweep"](None),
}


def made(kind):
    if "__init__" not in vars(kind):
        return kind("the message", 3)
    names = [name for name in inspect.signature(kind).parameters]
    given = [ARGUMENTS[name] for name in names]
    return kind(*(value() if callable(value) else value for value in given))


def test_all_errors_are_found():
    assert {"errors.PageFault", "errors.Interrupted", "studies.study.StudyInterrupted"} <= {
        name[11:] for name in ERRORS
    }
    assert len(ERRORS) >= 15


@every_way
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_itself(name, way):
    error = made(ERRORS[name])
    error.note = ["an attribute of the caller's"]
    error.add_note("a note")
    assert same(way(error), error)


def test_errors_that_the_engine_raises():
    vm = machine()
    for access in (lambda: vm.vcpus[0].read(0x900000), lambda: vm.vcpus[0].read(1 << 50, 8)):
        with pytest.raises(sc.GuestFault) as caught:
            access()
        assert same(pickle.loads(pickle.dumps(caught.value)), caught.value)


# ------------------------------------------------------------------------------------------------------ other processes


def fail_with(name):
    cpu = machine().vcpus[0]
    if name == "PageFault":
        cpu.write(0x900010, 1)
    if name == "GeneralProtection":
        cpu.read(1 << 50)
    if name == "MMIOAccess":
        cpu.read(0x408010)
    if name == "ConfigError":
        sc.VM("1MiB", "none such")
    raise made(ERRORS[f"shadowcore.errors.{name}"])


@pytest.fixture(scope="module")
def pools():
    context = multiprocessing.get_context()
    with context.Pool(1) as pool, concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        yield {
            "Pool": lambda *call: pool.apply_async(call[0], call[1:]).get(timeout=60),
            "ProcessPoolExecutor": lambda *call: executor.submit(*call).result(timeout=60),
        }


@pytest.mark.parametrize("pool", ["Pool", "ProcessPoolExecutor"])
@pytest.mark.parametrize(
    "name", [name.rpartition(".")[2] for name, kind in ERRORS.items() if kind.__module__ == "shadowcore.errors"]
)
def test_an_error_arrives_from_another_process(name, pool, pools):
    if issubclass(ERRORS[f"shadowcore.errors.{name}"], KeyboardInterrupt):
        with pytest.raises(sc.ShadowcoreError):  # as a result, for it ends a worker of a Pool
            raise pools[pool](made, ERRORS[f"shadowcore.errors.{name}"])
        return
    with pytest.raises(sc.ShadowcoreError) as caught:
        pools[pool](fail_with, name)
    assert type(caught.value).__name__ == name
    expected = {"PageFault": (0x900010, 2), "MMIOAccess": (0x200010,), "GeneralProtection": (0, 1 << 50)}
    if name in expected:
        assert tuple(vars(caught.value).values()) == expected[name]


@pytest.mark.parametrize("pool", ["Pool", "ProcessPoolExecutor"])
def test_results_arrive_from_another_process(pool, pools):
    assert same(pools[pool](a_run), a_run())
    assert pools[pool](a_run).stats.exits_total == a_run().stats.exits_total > 0


# ------------------------------------------------------------------------------------------------------------ results


def some_study(**more):
    return sc.study("fork-storm", ["native", "cached"], operations=3000, pages=16, children=2, written=4, **more)


def a_program(tmp_path):
    path = tmp_path / "a.screc"
    with Writer(path, "program") as writer:
        writer.processes.append({"number": 0})
        writer.event(Event.RUN, 0)
        writer.write(op=np.zeros(64, dtype=np.uint8), size=8, addr=np.arange(64, dtype=np.uint64) << 12)
    return path


# With a directory to work in.
RESULTS = {
    "RunResult": lambda _: a_run(),
    "RunResult without data": lambda _: a_run(data=False),
    "RunResult of 16 bytes": lambda _: a_run(size=16),
    "RunResult of 16 bytes without data": lambda _: a_run(data=False, size=16),
    "RunResult of nothing": lambda _: machine().vcpus[0].run(operations()),
    "Stats": lambda _: a_run().stats,
    "Stats of a VM": lambda _: machine().stats,
    "ExitLog": lambda _: a_log(),
    "TableHistory": lambda _: sc.VM("1MiB", "adaptive").mmu.explain(1),
    "TableStore": lambda _: sc.TableStore(0x1000, 0x2008, 2, 8, (5,), (1,), False, False),
    "Translation": lambda _: machine().vcpus[0].translate(0x401234, "w"),
    "Translation with paging off": lambda _: sc.VM("1MiB").vcpus[0].translate(0x1234),
    "AuditReport, Violation": lambda _: AuditReport((Violation("I1", "what", None, 2, 3),), 12, 5),
    "AuditReport of a VM": lambda _: machine().audit(),
    "Explanation, Step": lambda _: explain.explain(machine(), 0x400000),
    "AccessExplanation, ShadowStep": lambda _: sc.explain(machine(), 0x400000),
    "HostTrace": lambda _: host.read(DATA / "host" / "intel.txt"),
    "Dump": lambda _: images.Dump("a", "a raw memory image", ((0, 4096, 0),), {"cr3": 4096}),
    "Image": lambda _: explain.Image("a", "64", 9, 1, 2, 3, 4, np.arange(2, dtype="<u4"), np.zeros((2, 8)), (1,)),
    "CostBreakdown, Costs": lambda _: (sc.Costs.modern().of(machine().stats.as_dict()), sc.Costs.modern()),
    "Choice": lambda _: Choice({"modern": {"a": {"cached": 1.5}}}, {"a": {"cached": 2.0}}, {"a": 3.0}, 4),
    "Validity": lambda _: Validity("pvm-2023", (Row("a", "b", "c", "s", 1.0, 2.0),)),
    "Levels, Preset": lambda _: (sc.Costs.nested().levels, PRESETS["core2007"]),
    "Steps, Step": lambda _: sc.steps.show("invlpg", "unsync"),
    "Study, StudyDesign, WorkloadResult": lambda _: some_study(windows=1000),
    "Study, ReplayResult, Phase, Recording": lambda _: sc.study(trace.load().head(3000), ["cached"], windows=500),
    "Sweep": lambda _: sc.sweep(sources=trace.load().head(2000), designs="cached", operations=500, jobs=1),
    "Study, RecordingFile": lambda path: sc.study(saved(path), ["cached"]),
    "WorkloadResult, recorded": lambda _: sc.workload.run("idle", "cached", operations=2000, record=True),
    "OperationsResult": lambda path: replayed.run(made_operations(path / "a.screc"), "cached"),
    "Swept": lambda _: sc.compare("idle", ["cached"], over={"pcid": [False, True]}, operations=2000),
    "Audited": lambda _: studies.audit("idle", operations=2000, every=1000),
    "ProgramResult": lambda path: sc.programs.run(a_program(path), "cached"),
    "Survey, Region": lambda path: sc.programs.survey([a_program(path)]),
    "Fold": lambda _: Fold(*np.arange(9, dtype=np.uint64).reshape(3, 3)),
    "Measured": lambda _: reproduction.Measured(1, {"a": 2}, 3, 4, 5, 6),
    "Figure, Reproduction": lambda _: reproduction.Reproduction(
        sc.Costs.modern(), (reproduction.Figure("a", "b", 1.0, 2.0, 3.0, True, 4.0),), {}, {}, {}
    ),
    "PoolPoint, PoolStudy": lambda _: pool_study("demand", "cached", sizes=(8, 16), operations=2000),
    "Evolution, Release": lambda _: (evolution.evolution(["idle"], 2000), evolution.RELEASES),
    "ProcessState": lambda _: process.ProcessState(*range(7), mappings=np.zeros(2, dtype=[("start", "<u8")])),
    "Entry": lambda _: [sc.pagetables.Entry(1, 0x1000, 7)],
    "settings": lambda _: (
        sc.Shadow.kvm_2007(),
        sc.Native(),
        sc.TLB(),
        sc.ProcessorTLB.preset("zen4"),
        sc.Features(),
        sc.MemorySlot(0, 4096),
        sc.Op.CR3,
    ),
    "options": lambda _: (sc.KernelOptions(), sc.File(1, 2), sc.Prot.READ, sc.Touch(1), sc.Call(1)),
}


def saved(path):
    trace.load().head(3000).save(path / "a.screc")
    return path / "a.screc"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return functools.cache(lambda name: RESULTS[name](tmp_path_factory.mktemp("results")))


def test_all_results_are_among_them():
    """What is a dataclass or a named tuple, or has arrays or counters of its own."""
    compiled = {"RunResult", "Stats", "Translation", "ExitLog"}
    kinds = classes(
        lambda kind: dataclasses.is_dataclass(kind) or hasattr(kind, "_fields") or kind.__name__ in compiled
    )
    named = {word.strip() for name in RESULTS for word in name.split(",")}
    named |= {
        "Native",
        "Shadow",
        "TLB",
        "TLBBank",
        "ProcessorTLB",
        "Features",
        "MemorySlot",
        "KernelOptions",
        "File",
        "Nested",
    }
    # Work under way, and what is made anew rather than sent.
    named |= {"Program", "Area", "Life", "Format", "Row", "Event", "Block", "Source", "Split", "Parameter", "Workload"}
    named |= {"Setup", "Outcome", "Action", "Scenario"}
    # Parts of a picture, made and drawn at once.
    named |= {"Map", "Panel", "Spot"}
    named |= {"BackEnd", "Emulator"}
    # What a sweep sends, which its tests send.
    named |= {"Plan", "Point", "Run", "Shared", "Task", "Done", "Change", "Difference"}
    public = {kind.__name__ for kind in kinds.values() if not kind.__name__.startswith("_")}
    assert public - named == set()


@every_way
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_itself(name, way, results):
    assert same(way(results(name)), results(name))


def test_copies_are_of_their_own():
    vm = machine()
    counters = pickle.loads(pickle.dumps(vm.stats))
    vm.vcpus[0].read(0x400000)
    assert counters.accesses == 0
    assert vm.stats.accesses == 1
    counters.reset()
    assert vm.stats.accesses == 1
    result = a_run()
    other = copy.deepcopy(result)
    other.gpa[:] = 0
    assert result.gpa.any()


def test_what_no_pickle_holds_is_refused():
    kind, state = a_run().__reduce__()
    data, wide, words, rows, stats = state
    beyond = rows.copy()
    beyond["number"] = len(words[0])
    for bad in ((data, True, words, rows), (False, wide, words, rows), (data, wide, words[0], rows)):
        with pytest.raises(sc.ConfigError):
            kind(*bad, stats)
    with pytest.raises(sc.ConfigError):
        kind(data, wide, words, beyond, stats)
    kind, (mode, walk) = machine().vcpus[0].translate(0x400000).__reduce__()
    for name, value in (("level", 6), ("level", -1), ("top", 7), ("pte_size", 3)):
        with pytest.raises(sc.ConfigError):
            kind(mode, walk | {name: value})
