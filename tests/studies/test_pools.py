"""How many shadow pages a guest needs: `pool_study` and `shadowcore pool`."""

import json

import numpy as np
import policies as models
import pytest
from commands import refused, run

import shadowcore as sc
from shadowcore.engine.policies.references import misses, stack_distances
from shadowcore.studies.pools import pool_study


def test_stack_distances_are_the_misses_of_lru_at_every_size():
    string = np.minimum(np.random.default_rng(2).zipf(1.2, 1500), 60)
    curve = stack_distances(string)
    assert curve[0] == len(string)
    assert curve[-1] == len(np.unique(string))
    for size in range(4, len(curve)):
        assert curve[size] == misses("lru", size, string)
    assert curve[9] == sum(not model.ask(int(key)) for model in [models.Lru(9)] for key in string)
    assert stack_distances(np.zeros(0, np.uint64)).tolist() == [0]


@pytest.fixture(scope="module")
def found():
    return pool_study("demand", "cached", sizes=(8, 16, 32, 64), operations=20_000, settings={"pages": 20000})


def test_points_are_runs(found):
    for point in found.points[:3]:
        mmu = sc.Shadow.cached(pool_pages=point.pages)
        vm = sc.VM("128MiB", mmu, features=sc.Features())
        result = sc.workload.run("demand", vm, operations=20_000, pages=20000)
        assert result.stats["exits_total"] == point.exits
        assert result.stats["mmu_recycled"] == point.recycled


def test_the_smallest_pools_are_within_their_shares(found):
    for share, pages in found.within.items():
        assert min(p.exits for p in found.points if p.pages <= pages) <= found.endless.exits * (1 + share)
        assert all(p.exits > found.endless.exits * (1 + share) for p in found.points if p.pages < pages)
    assert found.within[0.01] >= found.within[0.05]


def test_the_command_prints_it(tmp_path):
    command = ["pool", "demand", "--operations", "5000", "--sizes", "16,64", "--csv", str(tmp_path / "c.csv")]
    assert "endless pool" in run(*command)
    assert (tmp_path / "c.csv").read_text().startswith("pages,exits,made,recycled,misses")
    plain = json.loads(run("pool", "demand", "--operations", "5000", "--sizes", "16,64", "--json"))
    assert plain["workload"] == "demand"
    assert set(plain["within"]) == {"5%", "1%"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mmu", "native"], "no shadow pages"),
        (["--sizes", "a,b"], "is not numbers"),
        (["--sizes", "3"], "sizes: 3 is not within 4"),
        (["--set", "policy=optimal"], "no policy to size a pool for"),
        (["--set", "policy=lruu"], "did you mean 'lru'"),
    ],
)
def test_bad_input_is_one_line(words, told):
    assert told in refused("pool", "demand", *words)
