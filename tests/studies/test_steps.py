"""Runs to step through: what a step says is what the engine did, forwards and back, in text, JSON and in a browser."""

import html
import json
import re

import numpy as np
import pytest
from browsers import rendered
from commands import refused, run
from places import DATA

import shadowcore as sc
from shadowcore import steps
from shadowcore.config import design
from shadowcore.engine.machine import VM
from shadowcore.studies.scenarios import Guest
from shadowcore.studies.stepped import SMALL_TLB, designs_of
from shadowcore.workload import WORKLOADS

CASES = [(name, mmu) for name, scenario in steps.SCENARIOS.items() for mmu in scenario.designs]


def machine(name, mmu):
    """The scenario's machine before its first operation, and the operations: made here, without `show`."""
    scenario = steps.SCENARIOS[name]
    made = design(mmu)
    if isinstance(made, sc.Shadow):
        made = made.__class__(**{**vars(made), **scenario.settings})
    vm = VM(scenario.memory, made, tlb=SMALL_TLB)
    guest = Guest(vm)
    scenario.setup(guest)
    guest.tables.activate(vm.vcpus[0])
    if isinstance(made, sc.Shadow):
        vm.mmu.zap_all()
    vm.stats.reset()
    return vm, guest.operations


def check(vm, state):
    """A state against the machine, read here in another way."""
    exits = {k.removeprefix("exits_"): v for k, v in vm.stats.as_dict().items() if k.startswith("exits_") and v}
    assert {k[2:]: int(v) for k, v in state.items() if k[0] == "c"} == exits
    assert int(state["v:0:cr3"], 16) == vm.vcpus[0].cr3
    tlb = {int(row["page"]): int(row["gpa"]) for row in vm.vcpus[0].tlb}
    told = {int(k.split(":")[2], 16): int(v.split("|")[0], 16) for k, v in state.items() if k[0] == "t"}
    assert told == tlb
    words = vm.memory.words.reshape(-1, 512)
    for key, value in state.items():
        kind, *rest = key.split(":")
        if kind == "g" and len(rest) == 2:
            assert int(value.split("|")[0], 16) == words[int(rest[0], 16), int(rest[1])]
    tables = {int(key[2:], 16) for key in state if re.fullmatch("g:[0-9a-f]+", key)}
    for gfn in tables:
        listed = {int(key.split(":")[2]) for key in state if key.startswith(f"g:{gfn:x}:")}
        assert listed == set(np.flatnonzero(words[gfn]).tolist())
    if not isinstance(vm.mmu.design, sc.Shadow):
        assert not any(key[0] in "sr" for key in state)
        return
    assert {int(key[2:]) for key in state if re.fullmatch("s:[0-9]+", key)} == set(vm.mmu.pages["page"].tolist())
    entries = {key: value for key, value in state.items() if re.fullmatch("s:[0-9]+:[0-9]+", key)}
    for page in vm.mmu.pages["page"].tolist():
        table = vm.mmu.table(page)
        listed = {
            int(k.split(":")[2]): int(v.split("|")[0], 16) for k, v in entries.items() if k.split(":")[1] == f"{page}"
        }
        assert listed == {i: int(table[i]) for i in np.flatnonzero(table).tolist()}
    for gfn in range(len(words)):
        told = state.get(f"r:{gfn:x}", "").split()
        assert told == [f"{page}.{index}" for page, index in vm.mmu.rmap(gfn).tolist()]


@pytest.mark.parametrize(("name", "mmu"), CASES)
def test_each_step_is_what_the_engine_did(name, mmu):
    """State by state, against a machine on which nobody looks while it runs; audits are clean after each."""
    found = steps.show(name, mmu)
    vm, ops = machine(name, mmu)
    assert len(found.steps) == len(ops)
    check(vm, found.state(0))
    exits = 0
    for number, step in enumerate(found.steps, 1):
        result = vm.vcpus[0].run(ops[number - 1 : number])
        assert len(step.exits) == vm.stats.exits_total - exits
        assert bool(step.outcome) == bool(result.outcome[0])
        exits += len(step.exits)
        check(vm, found.state(number))
        assert vm.audit().ok
    assert exits == vm.stats.exits_total


@pytest.mark.parametrize(("name", "mmu"), CASES)
def test_backwards(name, mmu):
    """Changes lead back as they lead on."""
    found = steps.show(name, mmu)
    state = found.state(len(found.steps))
    for step in reversed(found.steps):
        for key, before, after in step.changes:
            assert state.get(key) == after
            if before is None:
                del state[key]
            else:
                state[key] = before
    assert state == found.start


def exits(name, mmu):
    return [step.exits for step in steps.show(name, mmu).steps]


def test_what_each_scenario_is_for():
    """The thing that it is named after happens."""
    counts = {}
    for name, mmu in CASES:
        vm, ops = machine(name, mmu)
        vm.vcpus[0].run(ops)
        counts[name, mmu] = vm.stats.as_dict()
    assert counts["flood", "cached"]["mmu_flooded"] > 0
    assert counts["recycling", "cached"]["mmu_recycled"] > 0
    assert counts["unsync", "unsync"]["unsync_made"] > 0
    assert counts["unsync", "cached"]["pf_emulate"] == 4
    assert exits("switch", "cached")[6:12] == [(), (), ("cr3",), (), (), ("cr3",)]
    assert all(exits("switch", "flush"))
    assert exits("demand-paging", "cached")[4:] == [("guest",), ("emulate",), ("fill",), ()]
    assert exits("demand-paging", "native") == [()] * 8
    assert sum(map(len, exits("kpti", "flush"))) > sum(map(len, exits("kpti", "cached")))
    large = steps.show("large-page", "cached")
    assert any("direct" in value for key, value in large.state(1).items() if re.fullmatch("s:[0-9]+", key))
    mapped = steps.show("self-map", "cached").state(2)
    assert (
        len([1 for key, value in mapped.items() if re.fullmatch("s:[0-9]+", key) and value.split("|")[1] == "0x8"]) > 1
    )
    old = steps.show("invlpg", "unsync")
    assert old.steps[2].exits == ()


def test_names_are_of_one_thing():
    assert not set(steps.SCENARIOS) & set(WORKLOADS)
    assert len(steps.SCENARIOS) == 10


@pytest.mark.parametrize("name", ["pingpong", "demand"])
def test_workloads(name):
    """A workload's steps are those of the same operations in one run."""
    found = {mmu: steps.show(name, mmu, limit=40) for mmu in designs_of(name)}
    cached, unsync = found["cached"], found["unsync"]
    assert [step.title for step in cached.steps] == [step.title for step in unsync.steps]
    assert len(cached.steps) == 40
    later = steps.show(name, "cached", limit=10, start=cached.first + 30)
    assert [(s.title, s.exits) for s in later.steps] == [(s.title, s.exits) for s in cached.steps[30:]]
    assert later.state(10).items() >= {k: v for k, v in cached.state(40).items() if k[0] in "v"}.items()


def test_a_recording_of_a_guest(tmp_path):
    """The exits of the steps are those of a replay; without a start, it is shown from the first access of user code."""
    whole = sc.trace.load(DATA / "recordings" / "linux-fork.npz")
    start = whole.first_cr3 + 500
    head = whole.head(start + 80)
    head.save(tmp_path / "head.screc")
    found = steps.show(tmp_path / "head.screc", "unsync", start=start, limit=5_000)
    assert found.first == start
    first, last = (sc.trace.machine_at(head, "unsync", record) for record in (start, None))
    assert sum(len(step.exits) for step in found.steps) == last.stats.exits_total - first.stats.exits_total > 0
    entries = {k: v for k, v in found.state(len(found.steps)).items() if re.fullmatch("s:[0-9]+:[0-9]+", k)}
    for key, value in entries.items():
        page, index = map(int, key.split(":")[1:])
        assert int(value.split("|")[0], 16) == int(last.mmu.table(page)[index])
    with pytest.raises(sc.ConfigError, match="start"):
        steps.show(tmp_path / "head.screc", "cached", start=start + 80)


def test_a_recording_of_operations(tmp_path):
    vm, ops = machine("fork", "native")
    path = tmp_path / "ops.screc"
    with sc.recordings.Writer(path, sc.recordings.OPERATIONS, vm=vm) as writer:
        writer.write(ops)
    found = steps.show(path, "cached")
    assert [step.title for step in found.steps] == [step.title for step in steps.show("fork", "cached").steps]


def test_exits_only():
    every = steps.show("demand-paging", "cached")
    some = steps.show("demand-paging", "cached", exits_only=True)
    assert [s.title for s in some.steps] == [s.title for s in every.steps if s.exits]
    # What an operation without an exit changed is told with the next.
    assert {k: v for k, v in some.state(len(some.steps)).items() if k[0] == "s"} == {
        k: v for k, v in every.state(7).items() if k[0] == "s"
    }


# -- the command -------------------------------------------------------------------------------------------------


def test_command(tmp_path):
    assert [line.split()[0] for line in run("show").splitlines()] == list(steps.SCENARIOS)
    assert set(json.loads(run("show", "--json"))) == set(steps.SCENARIOS)
    text = run("show", "invlpg", "--mmu", "unsync")
    assert text.startswith("unsync: 8 steps, ")
    assert "The guest's entry 0 of table 0xe becomes 0x42007." in text
    (plain,) = json.loads(run("show", "invlpg", "--mmu", "unsync", "--json"))
    assert plain["steps"][1]["exits"] == ["fill"]
    page = tmp_path / "steps.html"
    assert run("show", "invlpg", "--html", page).startswith(f"{page}: 24 steps, under cached, unsync, flush")
    written = page.read_text("utf-8")
    command = html.unescape(re.search(r'<pre id="command">(.*?)</pre>', written)[1])
    page.unlink()
    run(*command.split()[1:])
    assert page.read_text("utf-8") == written
    assert "http" not in re.sub(r"<script.*?</script>", "", written, flags=re.S)


def test_bad_input(tmp_path):
    assert "did you mean 'fork'" in refused("show", "forkk")
    assert "pool" in refused("show", "fork", "--mmu", "native", "--pool", "64")
    assert "--html FILE" in refused("show", "fork", "--exercise")
    assert "start" in refused("show", "fork", "--start", "3")
    assert "cannot be written" in refused("show", "fork", "--html", tmp_path / "none" / "x.html")
    damaged = tmp_path / "x.screc"
    damaged.write_bytes(b"nothing")
    refused("show", damaged)
    with pytest.raises(sc.ConfigError, match="paging is off"):
        steps.capture(sc.VM("1MiB"), [])
    with pytest.raises(sc.ConfigError, match="number"):
        steps.show("fork", "cached").state(99)
    with pytest.raises(sc.ConfigError, match="limit"):
        steps.show("fork", "cached", limit=0)


# -- in a browser ------------------------------------------------------------------------------------------------

PROBE = """
<script>
(() => {
  const rows = {};
  for (const row of document.querySelectorAll("tr[data-key]:not(.gone)")) rows[row.dataset.key] = row.dataset.value;
  const found = document.createElement("pre");
  found.id = "probe";
  found.textContent = JSON.stringify({ rows, event: document.querySelector(".event").innerText,
    choices: [...document.querySelectorAll(".choices button")].map((b) => b.textContent) });
  document.body.append(found);
})();
</script>
</body>"""


def probed(path, fragment):
    probe = re.search(r'<pre id="probe">(.*?)</pre>', rendered(path, fragment), re.S)
    assert probe, "the page's script, or the one that looks at it, failed"
    return json.loads(html.unescape(probe[1]))


def test_in_chromium(tmp_path):
    """What the page shows at a step is the engine's state; where it folds entries away, no step meets them."""
    runs = [steps.show("unsync", mmu) for mmu in ("unsync", "cached")]
    path = tmp_path / "steps.html"
    path.write_text(steps.page(runs, "t", "", "c").replace("</body>", PROBE), "utf-8")
    for chosen, number in ((runs[0], 6), (runs[1], 10)):
        seen = probed(path, f"#{chosen.design}/{number}")
        state = {k: v for k, v in chosen.state(number).items() if not re.fullmatch("[gs]:[0-9a-f]+", k)}
        met = {key for step in chosen.steps for key in (*step.read, *(change[0] for change in step.changes))}
        assert seen["rows"].items() <= state.items()
        assert {k for k in state if k in met} <= set(seen["rows"])
        assert all(sentence in seen["event"] for sentence in chosen.steps[number - 1].happened)
    hidden = tmp_path / "exercise.html"
    hidden.write_text(steps.page(runs, "t", "", "c", exercise=True).replace("</body>", PROBE), "utf-8")
    seen = probed(hidden, "#unsync/3")
    before = runs[0].state(2)
    assert all(before[key] == value for key, value in seen["rows"].items())
    assert seen["choices"][:2] == ["no exit", "exit: fill"]
    assert not any(sentence in seen["event"] for sentence in runs[0].steps[2].happened)
