"""Design `nested` is the nested paging of Linux 6.1: every exit, mapping, event, counter and dirty log of the golden
vectors, in all configurations.

A file that is dropped into tests/data/kvm-6.1-npt is tried as the others are.
"""

import csv
import json
import pathlib

import numpy as np
import pytest
from nested_streams import NestedReplay, configurations

DATA = pathlib.Path(__file__).parents[1] / "data"
BASES = DATA / "kvm-6.1"
FILES = sorted(DATA.glob("kvm-6.1-npt/*.npz"))
# MORE.md, section 1: from this operation on the emulated processor's habit of setting bits in PAE root entries tells.
ENDS = {"fuzz_pae_s1": 495}


def based(path):
    """The file that this one's operations are those of; None: it has its own."""
    with np.load(path) as z:
        base = json.loads(str(z["info"])).get("base")
    return None if base is None else BASES / pathlib.Path(base).name


# Their operations are in no file that there is.
WITHOUT_OPERATIONS = {"dirtylog_pingpong_n5_64_s1.npz", "recursive_64_s1.npz"}
CASES = [
    (path, configuration)
    for path in FILES
    if path.name not in WITHOUT_OPERATIONS
    for configuration in configurations(path)
]
# By default one RAM of each kind; all with -m slow.
SAMPLE = ("tdp.warm2M", "shd.cold4K", "shd.warm2M", "tdp.cold4K")


def sampled(path, configuration):
    names = [each for each in configurations(path) if each in SAMPLE]
    return configuration == names[FILES.index(path) % len(names)]


def wavering(path, configuration):
    """The recording counted one request of a flush more, or less, when it was made again: MORE.md, section 8."""
    with (DATA / "kvm-6.1-npt" / "INDEX.tsv").open() as table:
        rows = {(row["file"], row["config"]): row for row in csv.DictReader(table, delimiter="\t")}
    row = rows.get((path.name, configuration))
    return row is not None and row["second_run"].startswith("counter")


@pytest.mark.parametrize(
    ("path", "configuration"),
    [
        pytest.param(*case, id=f"{case[0].stem}.{case[1]}", marks=() if sampled(*case) else pytest.mark.slow)
        for case in CASES
    ],
)
def test_every_operation(path, configuration):
    made = NestedReplay(path, configuration, BASES)
    spare = int(wavering(path, configuration))
    for k in range(min(len(made.ops), ENDS.get(path.stem, len(made.ops)))):
        differ = made.step(k)
        if spare and len(differ) == 1 and differ[0][0] == "cnt":
            ((name, (counted, wanted)),) = differ[0][1].items()
            if name == "remote_tlb_flush_requests" and abs(counted - wanted) == 1:
                spare, differ = 0, []
        assert differ == [], (k, made.ops[k])
    report = made.vm.audit()
    assert report.ok, str(report)


def test_a_file_is_left_out_only_for_want_of_its_operations():
    for path in FILES:
        base = based(path)
        assert (path.name in WITHOUT_OPERATIONS) == (base is not None and not base.exists())


def test_there_are_streams_of_every_kind():
    kinds = {path.stem.split("_")[0] for path in FILES}
    assert {
        "back", "backcol", "demand", "dirtyinit", "dirtylog", "dirtyman", "forkcow", "fuzz", "pingpong", "slots",
        "upper",
    } <= kinds  # fmt: skip
    assert len(CASES) > 100
