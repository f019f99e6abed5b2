"""Design `unsync` with the settings of Linux 6.1 and 6.12 is that KVM: every field of the golden vectors."""

import json
import pathlib

import numpy as np
import pytest
from kvm_files import KINDS, MODE, POKE
from kvm_streams import replay

DATA = pathlib.Path(__file__).parents[1] / "data"
FILES = (
    sorted(DATA.glob("kvm-6.1/*.npz")) + sorted(DATA.glob("kvm-6.12/*.npz")) + sorted(DATA.glob("kvm-6.1-more/*.npz"))
)
# Their operations are those of kvm-6.1/pingpong_n5_64_s1.npz, which does not exist.
WITHOUT_OPERATIONS = {f"dirtylog_pingpong_n5_64_s1.{host}.npz" for host in ("warm4K", "warm2M")}
FILES = [path for path in FILES if path.name not in WITHOUT_OPERATIONS]
NAMES = [f"{path.parent.name}/{path.stem}" for path in FILES]
# Operation by operation, one of each kind and mode, of the two kernels in turns; the others so as well, in slow tests.
CLOSELY = (
    "demand_64",
    "forkcow_pae",
    "forkswitch_32",
    "odddir_32",
    "tabledata_64",
    "unsync_64",
    "upper_32",
    "fuzz_64_s1",
    "fuzzH_32",
    "fuzzlazy_pae",
    "rights_t_64",
    "modeswitch",
    "pressure64_64",
    "largeH_64",
    "recursive_pae",
    "wide_",
    "smp_32",
    "giant",
    "back_64_s1.cold4K",
    "backlog_64_s2.cold2M",
    "slots_64_s4.warm2M",
)


def closely(path):
    """The kinds of which there is a file for each kernel alternate between them. In batches no instruction is begun
    anew after an exit: odddir_32 takes one less for it."""
    turn = next((place for place, kind in enumerate(CLOSELY) if path.name.startswith(kind)), None)
    if turn is None or path.parent.name == "kvm-6.1-more" or path.name.startswith("odddir_32"):
        return turn is not None
    return path.parent.name == ("kvm-6.1", "kvm-6.12")[turn % 2]


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if closely(path) else pytest.mark.slow) for path in FILES], ids=NAMES
)
def test_every_operation(path):
    """Results, exits, events and counters of each operation; pages, entries, roots, marks and memory at checkpoints."""
    made = replay(path)
    for k in range(len(made.ops)):
        assert made.step(k) == [], (path.name, k, made.ops[k])


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if not closely(path)],
    ids=[name for path, name in zip(FILES, NAMES, strict=True) if not closely(path)],
)
def test_totals(path):
    """The stream as batches: exits of each operation, totals of the counters, and the structure at checkpoints."""
    made = replay(path)
    differ, exits = made.in_batches()
    assert differ == []
    # Those at entries that remember a device are not counted, unless they are of other memory slots.
    known = np.bincount(made.z["flt"]["op"][made.z["flt"]["err"] & 8 != 0], minlength=len(exits))
    if "slots" in made.z:
        owner = np.repeat(np.arange(len(exits)), made.z["ev_count"])
        stale = (made.z["ev_kind"] == KINDS["device_checked"]) & (made.z["ev_c"] == 0)
        known = known - np.bincount(owner[stale], minlength=len(exits))
    assert exits == (np.bincount(made.z["flt"]["op"], minlength=len(exits)) - known).tolist()
    for name, columns in made.columns.items():
        assert getattr(made.vm.stats, name) == int(made.z["cnt"][:, columns].sum()), name


def test_there_are_streams_of_every_kind():
    kinds = {path.stem.split("_")[0] for path in FILES}
    assert len(FILES) > 140
    assert {
        "demand",
        "flood",
        "forkcow",
        "forkswitch",
        "fuzz",
        "fuzzH",
        "fuzzlazy",
        "globals",
        "large",
        "largeH",
        "modeswitch",
        "odddir",
        "oddleaf",
        "pingpong",
        "pressure128",
        "pressure64",
        "recursive",
        "rights",
        "tabledata",
        "unsync",
        "upper",
        "giant",
        "smp",
        "smplazy",
        "wide",
        "back",
        "backcol",
        "backlog",
        "slots",
    } <= kinds
    assert {MODE, POKE} == {13, 14}


def test_all_streams_with_operations_are_replayed():
    """A file is left out only because its operations are in none."""
    more = {path.name for path in DATA.glob("kvm-6.1-more/*.npz")}
    assert more - {path.name for path in FILES} == WITHOUT_OPERATIONS
    for name in WITHOUT_OPERATIONS:
        with np.load(DATA / "kvm-6.1-more" / name) as z:
            base = json.loads(str(z["info"]))["base"]
            assert "ops" not in z
            assert not (DATA / "kvm-6.1" / f"{base}.npz").exists()
