"""Policies and decisions in Python: by name, by entry point; and what they do wrong."""

import subprocess
import sys

import numpy as np
import pytest
import streams
from guest2007 import USER, Guest, P, W
from places import ROOT

import shadowcore as sc

COLUMNS = ("outcome", "error_code", "gpa", "value")


class Lru(sc.Policy, name="test-lru"):
    """`lru`, as it stands in a textbook."""

    def __init__(self):
        self.order = {}

    def made(self, page):
        self.order[page] = True

    def used(self, page):
        del self.order[page]
        self.order[page] = True

    def gone(self, page):
        del self.order[page]

    def victim(self):
        return next((page for page in self.order if not self.pages["root_count"][page]), None)


class Wrong(sc.Policy, name="test-wrong"):
    answer = None
    raised = None

    def victim(self):
        if self.raised is not None:
            raise self.raised
        return self.answer(self) if callable(self.answer) else self.answer


class Always(sc.Decisions, name="test-always"):
    answer = "emulate"
    seen = ()

    def store(self, table):
        Always.seen = (*Always.seen, table)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture
def always(monkeypatch):
    def answer(given):
        monkeypatch.setattr(Always, "answer", given)
        monkeypatch.setattr(Always, "seen", ())

    return answer


def design(policy, make=sc.Shadow.cached, **more):
    return make(pool_pages=16, min_free=5, refill=8, policy=policy, **more)


def ran(name, mmu):
    data = streams.stream(name)
    vm = streams.machine(data, mmu)
    result = vm.vcpus[0].run(data["ops"])
    assert vm.audit().ok
    return vm, result


@pytest.mark.parametrize("make", [sc.Shadow.cached, sc.Shadow.unsync])
@pytest.mark.parametrize("name", ["pressure_64_s1", "fuzz_pae_s6"])
def test_a_policy_in_python_is_what_the_engine_has(name, make):
    for more in ({}, {"recycle_children": True}, {"prefetch": 4, "update_in_place": True}):
        ours, one = ran(name, design("test-lru", make, **more))
        theirs, other = ran(name, design("lru", make, **more))
        assert ours.stats.as_dict() == theirs.stats.as_dict()
        assert np.array_equal(one.exits, other.exits)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("3", "victim: the number of a page is needed, not '3'"),
        (99, "victim: page 99 is not in use"),
        (-1, "victim: page -1 is not in use"),
        (1 << 70, "is not in use"),
        (lambda self: int(np.flatnonzero(self.pages["root_count"])[0]), "is a root in use"),
    ],
)
def test_a_bad_answer_is_an_error_and_nothing_is_half_done(answer, said, monkeypatch):
    monkeypatch.setattr(Wrong, "answer", staticmethod(answer) if callable(answer) else answer)
    data = streams.stream("pressure_64_s1")
    vm = streams.machine(data, design("test-wrong"))
    with pytest.raises(sc.PluginError, match=said) as caught:
        vm.vcpus[0].run(data["ops"])
    assert caught.value.plugin == "test-wrong"
    done = len(caught.value.result)
    assert vm.audit().ok
    # The machine goes on as one whose policy has no opinion; and at the next bad answer ends again.
    monkeypatch.setattr(Wrong, "answer", None)
    rest = vm.vcpus[0].run(data["ops"][done:])
    _, whole = ran("pressure_64_s1", design("fifo"))
    for column in COLUMNS:
        got = np.concatenate([getattr(caught.value.result, column), getattr(rest, column)])
        np.testing.assert_array_equal(got, getattr(whole, column))
    assert vm.audit().ok


def test_what_a_policy_raises(monkeypatch):
    monkeypatch.setattr(Wrong, "raised", KeyError("lost"))
    data = streams.stream("pressure_64_s1")
    vm = streams.machine(data, design("test-wrong"))
    with pytest.raises(sc.PluginError, match="test-wrong: KeyError: 'lost'") as caught:
        vm.vcpus[0].run(data["ops"])
    assert isinstance(caught.value.__cause__, KeyError)
    assert vm.audit().ok
    monkeypatch.setattr(Wrong, "raised", KeyboardInterrupt())
    vm = streams.machine(data, design("test-wrong"))
    with pytest.raises(KeyboardInterrupt):
        vm.vcpus[0].run(data["ops"])
    assert vm.audit().ok


def test_a_plug_in_may_not_use_its_machine():
    class Nosy(sc.Policy, name="test-nosy"):
        def made(self, page):
            if self.vm:
                self.vm[0].vcpus[0].read(0)

    Nosy.vm = []
    guest = Guest("64", sc.Shadow.cached(policy="test-nosy"))
    Nosy.vm.append(guest.vm)
    with pytest.raises(sc.PluginError, match="EngineError: this VM is in use"):
        guest.cpu.read(USER)
    assert guest.vm.audit().ok


class SavedLru(Lru, name="test-saved-lru"):
    def state(self):
        return np.array(list(self.order), dtype="<u4")

    def restore(self, state):
        pages = np.frombuffer(state, dtype="<u4").tolist()
        if sorted(pages) != np.flatnonzero(self.pages["active"]).tolist():
            raise ValueError("not the pages that there are")
        self.order = dict.fromkeys(pages, True)


class Patient(sc.Decisions, name="test-patient"):
    """Emulates, and zaps at each third store."""

    count = 0

    def store(self, table):
        self.count += 1
        return "unsync" if table.unsync else "emulate" if self.count % 3 else "zap"

    def state(self):
        return b"%d" % self.count

    def restore(self, state):
        self.count = int(state)


@pytest.mark.parametrize("make", [sc.Shadow.cached, sc.Shadow.unsync])
def test_a_saved_machine_has_what_its_plug_ins_kept(make, tmp_path):
    mmu = design("test-saved-lru", make, decides="test-patient")
    _, loaded = streams.saved_half_way("pressure_64_s1", mmu, tmp_path / "vm")
    assert loaded.audit().ok
    # A second file is equal to the first, and before anything was told there is one as well.
    loaded.save(tmp_path / "once")
    sc.VM.load(tmp_path / "once").save(tmp_path / "twice")
    assert (tmp_path / "once").read_bytes() == (tmp_path / "twice").read_bytes()
    sc.VM("1MiB", mmu).save(tmp_path / "new")
    assert sc.VM.load(tmp_path / "new").audit().ok


def test_a_plug_in_that_does_not_say_what_it_keeps(tmp_path):
    guest = Guest("64", sc.Shadow.cached(policy="test-lru"))
    with pytest.raises(sc.ConfigError, match=r"save: 'test-lru' cannot be saved, for Lru .* no method `state`"):
        guest.vm.save(tmp_path / "vm")
    guest = Guest("64", sc.Shadow.cached(decides="test-always"))  # keeps nothing of its own
    guest.vm.save(tmp_path / "vm")
    assert sc.VM.load(tmp_path / "vm").mmu.design.decides == "test-always"


def test_a_state_that_is_none(tmp_path, monkeypatch):
    guest = Guest("64", sc.Shadow.cached(policy="test-saved-lru"))
    guest.cpu.read(USER)
    guest.vm.save(tmp_path / "vm")
    kept = (tmp_path / "vm").read_bytes()
    for given, said in (
        (None, "state: TypeError"),
        ("text", "state: TypeError"),
        (np.ones((4, 4))[::2, ::2], "state: TypeError"),
    ):
        monkeypatch.setattr(SavedLru, "state", lambda self, given=given: given)
        with pytest.raises(sc.PluginError, match=f"test-saved-lru: {said}"):
            guest.vm.save(tmp_path / "vm")
        assert (tmp_path / "vm").read_bytes() == kept
    for given in (b"", b"x", b"\0" * 4 * 10_000, np.arange(9, dtype="<u4")):
        monkeypatch.setattr(SavedLru, "state", lambda self, given=given: given)
        guest.vm.save(tmp_path / "vm")
        with pytest.raises(
            sc.SnapshotError, match="what a plug-in can have kept expected: test-saved-lru: restore: Val"
        ):
            sc.VM.load(tmp_path / "vm")
    assert guest.vm.audit().ok


def editing(mmu):
    guest = Guest("64", mmu)
    guest.cpu.read(USER)
    guest.see(guest.entry(USER))
    return guest, guest.tables.entry(USER).value


@pytest.mark.parametrize(
    ("answer", "moved"),
    [
        ("emulate", {"pf_taken": 1, "pf_emulate": 1}),
        ("zap", {"pf_taken": 1, "pf_emulate": 1, "mmu_shadow_zapped": 1, "mmu_unprotect": 1}),
        ("unprotect", {"pf_taken": 2, "mmu_shadow_zapped": 1, "mmu_unprotect": 1}),
        ("unsync", {"pf_taken": 1, "pf_emulate": 1}),
    ],
)
def test_what_becomes_of_a_store(answer, moved, always):
    always(answer)
    guest, value = editing(sc.Shadow.cached(decides="test-always"))
    with guest.counting() as counted:
        guest.edit(USER, value & ~W)
    counted.pop("rmap_protected", None)
    assert counted == moved
    (table,) = Always.seen
    assert (table.gfn, table.nbytes, table.levels) == (guest.table(USER), 8, (1,))
    assert not table.in_use
    assert not table.unsync
    assert guest.cpu.read(guest.window(guest.entry(USER)), 8) == value & ~W
    assert guest.vm.audit().ok
    with pytest.raises(sc.PageFault):
        guest.cpu.write(USER, 1, user=True)


def test_a_root_in_use_is_emulated_whatever_is_answered(always):
    always("unprotect")
    guest, _ = editing(sc.Shadow.cached(decides="test-always"))
    top = guest.tables.entry(USER, 4).value
    guest.see(guest.entry(USER, 4))
    with guest.counting() as counted:
        guest.edit(USER, top, level=4)
    assert counted["pf_emulate"] == 1
    assert guest.vm.audit().ok


def test_a_leaf_table_that_is_not_let_go(always):
    for answer, unsync in (("unsync", 1), ("emulate", 0), ("zap", 0)):
        always(answer)
        guest, value = editing(sc.Shadow.unsync(decides="test-always"))
        with guest.counting("mmu_unsync") as counted:
            guest.edit(USER, value & ~P)
        assert counted.get("mmu_unsync", 0) == unsync or guest.vm.stats.mmu_unsync == unsync, answer
        assert Always.seen[0].unsync
        assert guest.vm.audit().ok
        guest.cpu.invlpg(USER)
        with pytest.raises(sc.PageFault):
            guest.cpu.read(USER)


@pytest.mark.parametrize("answer", ["leave", None, ValueError("no")])
def test_a_bad_decision_stores_nothing(answer, always):
    always(answer)
    guest, value = editing(sc.Shadow.cached(decides="test-always"))
    with pytest.raises(sc.PluginError, match=r"test-always: (store: one of emulate, unprotect|ValueError: no)"):
        guest.edit(USER, 0)
    always("emulate")
    assert guest.cpu.read(guest.window(guest.entry(USER)), 8) == value
    assert guest.vm.audit().ok
    guest.edit(USER, value)


def test_the_embedder_is_asked_as_well(always):
    always("emulate")
    guest, value = editing(sc.Shadow.cached(decides="test-always"))
    asked = []
    guest.vm.mmu.can_emulate = lambda gva, gpa, nbytes: asked.append(gpa) or True
    guest.edit(USER, value)
    assert asked == [guest.entry(USER)]
    guest.see(guest.entry(USER))

    def broken(gva, gpa, nbytes):
        raise OSError("gone")

    guest.vm.mmu.can_emulate = broken
    with pytest.raises(OSError, match="gone"):
        guest.edit(USER, value)


@pytest.mark.parametrize("answer", ["emulate", "zap", "unprotect"])
@pytest.mark.parametrize("name", ["fuzz_32_s6", "fuzz_pae_s6"])
def test_the_guest_sees_the_same(name, answer, always):
    always(answer)
    vm, result = ran(name, sc.Shadow.cached(decides="test-always", policy="test-lru", pool_pages=16, refill=8))
    native, expected = ran(name, "native")
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(result, column), getattr(expected, column))
    assert streams.different_frames(streams.frames_of(vm), streams.frames_of(native)) == []


def test_names():
    with pytest.raises(sc.ConfigError, match="policy: there is no 'test-lur'; did you mean 'test-lru'"):
        sc.Shadow.cached(policy="test-lur")
    with pytest.raises(sc.ConfigError, match="decides: there is no 'test-alwys'; did you mean 'test-always'"):
        sc.Shadow.cached(decides="test-alwys")
    with pytest.raises(sc.ConfigError, match="name: letters, digits"):
        type("Odd", (sc.Policy,), {}, name="a b")
    with pytest.raises(sc.ConfigError, match="guest tables have to be shadowed"):
        sc.Shadow.flush(decides="test-always")

    class Unmade(sc.Policy, name="test-unmade"):
        def __init__(self):
            raise RuntimeError("not today")

    with pytest.raises(sc.ConfigError, match=r"test-unmade.*cannot be made: not today"):
        sc.VM("1MiB", sc.Shadow.cached(policy="test-unmade"))


def test_a_package_brings_its_own(tmp_path):
    """examples/plugins where it was installed: its entry points, and what the command line makes of them."""
    source = ROOT / "examples" / "plugins"
    module = "shadowcore_example_plugins.py"
    (tmp_path / module).write_text((source / module).read_text("utf-8"))
    info = tmp_path / "shadowcore_example_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shadowcore-example-plugins\nVersion: 1.0\n")
    text = (source / "pyproject.toml").read_text("utf-8")
    points = ""
    for group in ("shadowcore.policies", "shadowcore.designs"):
        lines = text.split(f'[project.entry-points."{group}"]\n')[1].split("\n\n")[0]
        points += f"[{group}]\n" + lines.replace('"', "") + "\n"
    (info / "entry_points.txt").write_text(points)

    def shadowcore(*words):
        return subprocess.run(
            [sys.executable, "-c", "import sys; from shadowcore.cli import main; main(sys.argv[1:])", *words],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "", "COLUMNS": "100"},
        )

    run = ("compare", "demand", "--operations", "1000", "--mmu", "cached", "--pool", "16")
    assert shadowcore(*run, "--set", "policy=lfu").returncode == 0
    assert shadowcore(*run, "--set", "decides=patient").returncode == 0
    listed = shadowcore(*run, "--set", "policy=?")
    assert listed.returncode
    assert "fifo, lru" in listed.stderr
    assert "lfu" in listed.stderr
