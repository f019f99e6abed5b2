"""The guard that counts instructions: what it makes of profiles, and when it complains."""

import json

import instructions
import pytest

PROFILE = """\
version: 1
events: Ir

ob=(1) /somewhere/shadowcore/vcpu.so
fl=(1) ???
fn=(1) run
0 100
cob=(2) /lib/libc.so.6
cfn=(2) memset
calls=3 0
0 30
0 11

ob=(2)
fn=(2)
0 30

ob=(1)
fn=(3) walk
+1 9
-1 1
* 2
summary: 153
"""


def test_calls_are_counted_once_and_the_engine_apart(tmp_path):
    profile = tmp_path / "profile.1"
    profile.write_text(PROFILE)
    assert instructions.costs(profile) == (153, 123)


def counts(**runs):
    return {name: {"instructions": number, "engine": number - 1.0} for name, number in runs.items()}


def test_a_growth_over_three_percent_is_named():
    known = counts(hit=100.0, walk=200.0, zap=50.0)
    assert instructions.grown(counts(hit=102.9, walk=200.0, zap=10.0), known) == []
    (complaint,) = instructions.grown(counts(hit=100.0, walk=207.0, zap=50.0), known)[:1]
    assert complaint.startswith("walk: 20")
    assert "+3.5%" in complaint


def test_a_growth_of_the_engine_alone_is_named():
    known, found = counts(hit=100.0), counts(hit=100.0)
    found["hit"]["engine"] = 110.0
    assert instructions.grown(found, known) == ["hit: 110.0 instructions in the engine, +11.1% of 99.0"]


def test_a_run_that_is_to_cost_what_another_does_is_compared_with_that():
    """Whatever is kept for it."""
    name = "hit" + instructions.LOOKED
    known = counts(**{"hit": 100.0, name: 200.0})
    assert instructions.grown(counts(**{"hit": 100.0, name: 104.0}), known) == []
    (complaint,) = instructions.grown(counts(**{"hit": 100.0, name: 110.0}), known)
    assert complaint.startswith(f"{name}: 109")
    assert complaint.endswith("of hit")


def test_runs_that_come_or_go_are_named():
    assert instructions.grown(counts(a=1.0), counts(b=1.0)) == [
        "a: it is not in instructions.json",
        "b: it was not run",
    ]


def test_kept_counts_are_of_the_runs_there_are():
    """Every toolchain in the file has the same runs, at least ten."""
    names = {tuple(runs) for runs in json.loads(instructions.KEPT.read_text("utf-8")).values()}
    assert len(names) == 1
    assert len(names.pop()) >= 10


def test_the_toolchain_is_told_by_the_modules_themselves():
    try:
        found = instructions.toolchain()
    except instructions.Unavailable as error:
        pytest.skip(str(error))
    assert "Cython 3." in found
    assert "GCC" in found or "clang" in found
