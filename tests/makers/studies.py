"""Studies as reports take them, without the module that makes them: real replays, with costs that are made up."""

from types import SimpleNamespace

import numpy as np
from places import LINUX_FORK

from shadowcore.recording import replay as trace
from shadowcore.recording.records import replay as replay_records
from shadowcore.studies.heat import heat

CYCLES = {"exits_and_entries": 2400, "handler": 900, "walks": 30}
"""Of an exit, of its handling, of an entry that a walk reads."""


def design(recording, name, windows):
    """One design: counters, and the same in windows, from a replay of the records after the first CR3 load."""
    first = recording.first_cr3
    vm = trace._machine(recording, trace.design(name), first)
    vm.stats.reset()
    arrays = recording.arrays | {"flags": trace.piece_flags(recording, recording.first_user, 0)}
    ends = [first + (recording.operations - first) * (i + 1) // windows for i in range(windows)]
    rows, begin, before = [], first, vm.stats.as_dict()
    for end in ends:
        done = replay_records(vm, arrays, begin, end, recording.direct_map)
        after = vm.stats.as_dict()
        pages = {
            "operation": end,
            "pages_mean": done["pages_sum"] / max(end - begin, 1),
            "pages_max": done["pages_max"],
        }
        rows.append({key: after[key] - before[key] for key in after} | pages)
        begin, before = end, after
    counters = vm.stats.as_dict()
    cycles = {
        "exits_and_entries": CYCLES["exits_and_entries"] * counters["exits_total"],
        "handler": CYCLES["handler"] * counters["exits_total"],
        "walks": CYCLES["walks"] * (counters["walk_references"] + counters["guest_walk_references"]),
    }
    columns = {
        key: np.array([row[key] for row in rows], dtype=np.float64 if key == "pages_mean" else np.uint64)
        for key in rows[0]
    }
    return SimpleNamespace(
        counters=counters,
        cost=SimpleNamespace(
            cycles=cycles, total=sum(cycles.values()), slow_down=1.5, microseconds=sum(cycles.values()) / 2400
        ),
        seconds=0.125,
        operations=recording.operations,
        windows=columns,
    )


def study(records=None, designs=("native", "flush", "cached"), windows=60, **changed):
    """A study of a recorded Linux guest, or of its first records."""
    recording = trace.load(LINUX_FORK)
    if records:
        recording = recording.head(records)
    made = {name: design(recording, name, windows) for name in designs}
    for each in made.values():
        each.cost.slow_down = each.cost.total / made[designs[0]].cost.total
    warm = heat(recording, designs)
    plain = {
        "workload": recording.name,
        "settings": {"pool_pages": 256, "costs": {"name": "made up", **CYCLES}},
        "command": "shadowcore compare --html out.html",
        "operations": recording.operations,
        "designs": made,
        "processes": warm["processes"],
        "frames": warm["frames"],
    }
    return SimpleNamespace(**(plain | changed))
