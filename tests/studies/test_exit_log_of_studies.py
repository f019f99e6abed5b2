"""Logs of exits of studies: of every kind of source, and as the file of `shadowcore compare --exits-log`."""

import csv

import numpy as np
import pytest
from commands import refused, run
from sources import KINDS, made

import shadowcore as sc
from shadowcore.engine.counters import EXIT_REASONS
from shadowcore.recording import replay as trace

DESIGNS = ("native", "flush", "cached", "unsync", "nested")


@pytest.mark.parametrize("warm_up", [0, 1500])
@pytest.mark.parametrize("kind", KINDS)
def test_the_log_is_of_what_is_counted(kind, warm_up, tmp_path):
    source = made(kind, tmp_path)
    limit = {"operations": 4000} if kind == "workload" else {}
    logged = sc.study(source, DESIGNS, windows=0, warm_up=warm_up, log_exits=True, **limit)
    plain = sc.study(source, DESIGNS, windows=0, warm_up=warm_up, **limit)
    for name, found in logged.designs.items():
        assert found.counters == plain.designs[name].counters
        assert plain.designs[name].exit_log is None
        rows = found.exit_log
        by_reason = np.bincount(rows["reason"], minlength=len(EXIT_REASONS)).tolist()
        assert dict(zip(EXIT_REASONS, by_reason, strict=True)) == found.exits
        assert rows["zapped"].sum() == found.counters["mmu_shadow_zapped"]
        assert rows["made"].sum() == found.counters["mmu_cache_miss"]
        numbers = rows["operation"].astype(np.int64)
        assert kind == "program" or ((np.diff(numbers) >= 0).all() and (numbers >= warm_up).all())
    assert "exit_log" not in str(logged.as_dict())


def test_a_record_has_its_number():
    """The exits of a log are those of the records that it names, replayed one by one."""
    recording = trace.load().head(3000)
    (found,) = sc.study(recording, ["cached"], windows=0, log_exits=True).designs.values()
    totals = [sc.trace.replay(recording, "cached", stop=n).whole.exits_total for n in range(1040, 1071)]
    numbers = found.exit_log["operation"]
    assert np.diff(totals).tolist() == [np.count_nonzero(numbers == number) for number in range(1040, 1070)]
    assert totals[-1] > totals[0]


def test_the_command(tmp_path):
    file = tmp_path / "exits.csv"
    some = ("--mmu", "cached", "--mmu", "flush", "--operations", 3000)
    run("compare", "fork-storm", *some, "--exits-log", file, "--json")
    with file.open() as text:
        rows = list(csv.DictReader(text))
    study = sc.study("fork-storm", ["cached", "flush"], operations=3000, windows=0)
    for name, design in study.designs.items():
        reasons = [row["reason"] for row in rows if row["design"] == name]
        assert {reason: reasons.count(reason) for reason in EXIT_REASONS} == design.exits
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with the extra parquet")
    run("compare", "fork-storm", *some, "--exits-log", tmp_path / "exits.parquet", "--json")
    table = parquet.read_table(tmp_path / "exits.parquet").to_pydict()
    assert list(table) == list(rows[0])
    assert all([row[name] for row in rows] == ["" if v is None else str(v) for v in table[name]] for name in table)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--exits-log", "a.txt"], "--exits-log: a file that ends in .csv or .parquet is needed, not 'a.txt'"),
        (["--exits-log", "a.csv", "--over", "pool=16,32"], "--exits-log: it is of one study, and --over makes several"),
        (["--exits-log", "a.csv", "--csv", "a.csv"], "--exits-log: another file than a.csv is needed"),
        (["--exits-log", "no/a.csv"], "there is no directory no"),
    ],
)
def test_bad_files(more, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused("compare", "idle", "--operations", 500, *more)
    assert not list(tmp_path.iterdir())
