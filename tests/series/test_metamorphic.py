"""Settings of the shadow cache change its cost, never what the guest sees.

The same operations under pools from hardly enough to more than enough and flood thresholds from every store
to never: outcomes, error codes, addresses, values read and the final memory are identical."""

import numpy as np
import pytest
import streams

import shadowcore as sc

FUZZ = [name for name in streams.STREAMS if "fuzz" in name]
SETTINGS = [(pool, flood) for pool in (8, 25, 256, 4096) for flood in (1, 3, None)]
USUAL = (256, 3)


def seen_by_guest(name, pool_pages, flood_threshold):
    data = streams.stream(name)
    design = sc.Shadow.cached(pool_pages=pool_pages, flood_threshold=flood_threshold)
    vm = streams.machine(data, design)
    result = vm.vcpus[0].run(data["ops"])
    assert vm.audit().ok
    columns = [np.asarray(getattr(result, key)) for key in ("outcome", "error_code", "gpa", "value")]
    return columns, streams.frames_of(vm), np.asarray(result.exits).sum()


@pytest.fixture(scope="module")
def usual():
    return {name: seen_by_guest(name, *USUAL) for name in FUZZ}


@pytest.mark.parametrize(("pool_pages", "flood_threshold"), [s for s in SETTINGS if s != USUAL])
@pytest.mark.parametrize("name", FUZZ)
def test_settings_do_not_show(name, pool_pages, flood_threshold, usual):
    columns, frames, _ = seen_by_guest(name, pool_pages, flood_threshold)
    for got, want in zip(columns, usual[name][0], strict=True):
        np.testing.assert_array_equal(got, want)
    assert streams.different_frames(frames, usual[name][1]) == []


@pytest.mark.parametrize("name", FUZZ)
def test_settings_do_matter_for_the_cost(name, usual):
    """Were the settings ignored, the comparison above would compare nothing."""
    small, _, exits_small = seen_by_guest(name, 8, 3)
    assert exits_small > usual[name][2]
    assert seen_by_guest(name, 256, None)[2] != usual[name][2]
    assert len(small[0]) == len(streams.stream(name)["ops"])
