"""Recordings of guests in files of blocks: replayed piece by piece, they come to what they come to as a whole."""

import dataclasses
import json

import numpy as np
import pytest
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st
from places import LINUX_FORK

import shadowcore as sc
from shadowcore.recording import replay as trace
from shadowcore.recordings import GUEST, PROGRAM, Writer

SCALARS = ("cr0", "cr4", "efer", "nframes")
TINY = ((1, 1500), (2, 2500), (13, 6000))  # blocks of so many records, and so many records of them


@pytest.fixture(scope="module")
def linux():
    return trace.load(LINUX_FORK)


def write(recording, path, block=1 << 18):
    guest = {name: getattr(recording, name) for name in SCALARS}
    with Writer(path, GUEST, name=recording.name, guest=guest, block=block) as writer:
        writer.write(**recording.arrays)
    return path


def equal(one, other):
    """All results of two replays, but for the time they took."""
    return dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)


def test_lossless(tmp_path, linux):
    """Every record of a recording, and its scalars; the file is smaller than the .npz."""
    path = tmp_path / "linux.screc"
    linux.save(path)
    again = trace.load(path)
    assert again.name == linux.name
    for name, array in linux.arrays.items():
        assert (getattr(again, name) == array).all()
        assert getattr(again, name).dtype == array.dtype
    assert all(getattr(again, name) == getattr(linux, name) for name in SCALARS)
    linux.save(tmp_path / "linux.npz")
    assert path.stat().st_size < (tmp_path / "linux.npz").stat().st_size


@pytest.fixture(scope="module")
def in_blocks(linux, tmp_path_factory):
    return write(linux, tmp_path_factory.mktemp("whole") / "linux.screc", 10_007)


@pytest.mark.parametrize("design", ["native", "flush", "cached", "kvm-2007", "unsync"])
def test_the_whole_recording_in_blocks(in_blocks, linux, design):
    streamed = trace.open_recording(in_blocks)
    assert isinstance(streamed, trace.RecordingFile)
    assert (streamed.operations, streamed.first_user, streamed.first_cr3) == (1_262_787, 542_801, 2059)
    assert (streamed.memory_size, streamed.direct_map) == (linux.memory_size, linux.direct_map)
    assert "1262787 records" in repr(streamed)
    assert equal(trace.replay(streamed, design), trace.replay(linux, design))


@pytest.fixture(scope="module")
def part(linux):
    """The beginning, where the boot code's tables are put in place."""
    return linux.head(20_000)


@pytest.mark.parametrize(
    ("block", "records"),
    [(1, 600), (2, 1000), (13, 2500), (1000, 20_000), *(pytest.param(*big, marks=pytest.mark.slow) for big in TINY)],
)
def test_tiny_blocks(tmp_path, part, block, records):
    """Tables and their words, and stores with their accesses, lie across the ends of blocks."""
    short = part.head(records)
    streamed = trace.open_recording(write(short, tmp_path / "part.screc", block))
    pieces = list(streamed.pieces())
    assert [base for base, _ in pieces] == np.cumsum([0, *(piece.operations for _, piece in pieces)])[:-1].tolist()
    for name, array in short.arrays.items():
        assert (np.concatenate([getattr(piece, name) for _, piece in pieces]) == array).all()
    assert (np.concatenate([piece.snapshot for _, piece in pieces]) == short.snapshot).all()
    assert len(pieces) > 1
    assert equal(trace.replay(streamed, "cached"), trace.replay(short, "cached"))


@pytest.mark.parametrize("start", [1, 2059, 51_206, 200_000, 504_360, 542_801, 595_000])
def test_start_and_stop_anywhere(tmp_path_factory, linux, start):
    path = tmp_path_factory.getbasetemp() / "parts.screc"
    if not path.exists():
        write(linux.head(600_000), path, 3001)
    streamed, whole = trace.open_recording(path), linux.head(600_000)
    for stop in (start + 1, start + 4000):
        streamed_result = trace.replay(streamed, "cached", start=start, stop=stop, audit_every=1500)
        assert equal(streamed_result, trace.replay(whole, "cached", start=start, stop=stop, audit_every=1500))


FRAMES = 4
RECORDS = st.lists(
    st.one_of(
        st.tuples(st.just(trace.TABLE), st.just(1), st.integers(0, FRAMES - 1).map(lambda f: f << 12), st.just(0)),
        st.tuples(
            st.just(trace.STORE),
            st.sampled_from([1, 1 | trace.SNAPSHOT, 1 | trace.SNAPSHOT]),
            st.tuples(st.integers(0, FRAMES - 1), st.integers(0, 3)).map(lambda x: x[0] << 12 | x[1] << 3),
            st.integers(0, 9),
        ),
        st.tuples(
            st.just(trace.ACCESS),
            st.integers(0, 3),
            st.integers(0, FRAMES).map(lambda f: f << 12 | 0x7000_0000_0000),
            st.integers(0, FRAMES * 512 - 1).map(lambda w: w << 3),
        ),
        st.tuples(st.sampled_from([trace.LOAD_CR3]), st.just(0), st.just(0x1000), st.just(0)),
    ),
    min_size=1,
    max_size=80,
)


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.integers(1, 40), st.data())
def test_any_records_in_any_blocks(tmp_path_factory, rows, block, data):
    """What is derived, the tables at any record, and the replay."""
    kind, flags, addr, value = (list(column) for column in zip(*rows, strict=True))
    whole = trace.Recording(
        name="made",
        kind=np.array(kind, dtype=np.uint8),
        flags=np.array(flags, dtype=np.uint16),
        insns=np.arange(len(rows), dtype=np.uint32),
        addr=np.array(addr, dtype=np.uint64),
        value=np.array(value, dtype=np.uint64),
        **{"cr0": 0x80010011, "cr4": 0x20, "efer": 0xD01, "nframes": FRAMES},
    )
    streamed = trace.open_recording(write(whole, tmp_path_factory.mktemp("any") / "made.screc", block))
    for name in ("first_user", "first_cr3", "direct_map", "operations"):
        assert getattr(streamed, name) == getattr(whole, name)
    start = data.draw(st.integers(0, len(rows) - 1))
    made = sc.Shadow.cached(pool_pages=16)
    memory = [trace._machine(source, made, start).memory.bytes for source in (whole, streamed)]
    assert (memory[0] == memory[1]).all()
    assert equal(trace.replay(whole, made, start=start), trace.replay(streamed, made, start=start))


def bad_at(linux, record, **values):
    arrays = {name: array[:3000].copy() for name, array in linux.arrays.items()}
    for name, value in values.items():
        arrays[name][record] = value
    return arrays


@pytest.mark.parametrize("record", [0, 99, 100, 2345, 2999])
def test_bad_records_are_named(tmp_path, linux, record):
    path = tmp_path / "bad.screc"
    with Writer(path, GUEST, guest={name: getattr(linux, name) for name in SCALARS}, block=100) as writer:
        writer.write(**bad_at(linux, record, kind=11))
    for function in (trace.load, lambda path: trace.replay(trace.open_recording(path))):
        with pytest.raises(sc.TraceError) as caught:
            function(path)
        assert caught.value.record == record
        assert caught.value.file == str(path)
        assert "a kind from 1 to 10 expected, not kind 0xb" in caught.value.expected


def test_a_table_without_an_end_is_refused_and_late_stores_are_not(tmp_path, linux):
    guest = {name: getattr(linux, name) for name in SCALARS}
    records = 400_000
    for kind, name in ((trace.TABLE, "table"), (trace.TABLE_END, "late")):
        with Writer(tmp_path / f"{name}.screc", GUEST, guest=guest, block=50_000) as writer:
            kinds = np.full(records, trace.STORE)
            kinds[0] = kind
            writer.write(kind=kinds, flags=1 | trace.SNAPSHOT, addr=np.full(records, 0x4000), value=np.arange(records))
    with pytest.raises(sc.TraceError, match="a table of 65536 words at most"):
        trace.replay(trace.open_recording(tmp_path / "table.screc"))
    late = trace.open_recording(tmp_path / "late.screc")
    assert trace.replay(late, "cached", start=records - 10).whole.records == 10
    assert equal(trace.replay(late, "cached"), trace.replay(trace.load(tmp_path / "late.screc"), "cached"))


def test_files_that_hold_no_guest(tmp_path):
    with Writer(tmp_path / "program.screc", PROGRAM) as writer:
        writer.write(op=0, size=1, addr=np.arange(5))
    with pytest.raises(sc.TraceError, match="a recording of a guest expected, not of program"):
        trace.open_recording(tmp_path / "program.screc")
    for nframes, records in ((0, 1), (1 << 41, 1), (64, 0)):
        guest = {"cr0": 0x80010011, "cr4": 0x20, "efer": 0xD01, "nframes": nframes}
        with Writer(tmp_path / "empty.screc", GUEST, guest=guest) as writer:
            writer.write(kind=np.full(records, 5))
        with pytest.raises(sc.TraceError, match=r"at least one record|'nframes': one integer from 1"):
            trace.open_recording(tmp_path / "empty.screc")


def test_commands_take_either_file(tmp_path, linux):
    short = linux.head(60_000)
    short.save(tmp_path / "a.npz")
    short.save(tmp_path / "a.screc")
    found = []
    for name in ("a.npz", "a.screc"):
        plain = json.loads(run("compare", tmp_path / name, "--json"))
        plain.pop("workload")
        assert name in plain.pop("command")
        for design in plain["designs"].values():
            del design["seconds"], design["operations_per_second"]
        found.append(plain)
    assert found[0] == found[1]
    assert "60,000 records, 2 audits, no violations" in run("audit", tmp_path / "a.screc", "--every", 30_000)
