"""Recordings that are damaged, cut short or wrong: it is noticed, and named."""

import json
import zipfile

import numpy as np
import pytest
from recorded import addresses, read

import shadowcore as sc
from shadowcore import recordings
from shadowcore.recording import replay as trace
from shadowcore.recording.packing import to_npy
from shadowcore.recording.reader import MEMBER_MAX
from shadowcore.recordings import EVENT_DTYPE, PROGRAM, Event, Reader, Writer


@pytest.fixture
def small(tmp_path):
    """A recording of a program: three blocks, events, two processes."""
    path = tmp_path / "small.screc"
    with Writer(path, PROGRAM, block=100) as writer:
        writer.event(Event.RUN, 0)
        writer.write(op=np.arange(150) % 4, size=8, addr=addresses(150))
        writer.event(Event.RUN, 1)
        writer.write(op=0, size=4, addr=np.arange(90) * 8)
    return path


def test_every_damaged_byte_is_noticed_or_does_not_matter(small, tmp_path):
    good = small.read_bytes()
    expected = read(small)[:2]
    bad = tmp_path / "bad.screc"
    refused = 0
    for at in range(0, len(good), 2):
        bad.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        try:
            whole, events, _ = read(bad, ahead=0)
        except sc.TraceError:
            refused += 1
            continue
        assert events == expected[1], at
        assert all((whole[name] == expected[0][name]).all() for name in whole), at
    assert refused > 0.4 * len(good)


def test_every_cut_is_noticed(small, tmp_path):
    good = small.read_bytes()
    bad = tmp_path / "bad.screc"
    for length in [*range(0, len(good), 13), len(good) - 1]:
        bad.write_bytes(good[:length])
        with pytest.raises(sc.TraceError, match="cut short"):
            Reader(bad)


def rewritten(path, members, follow=True):
    """A copy with members replaced, added, or (None) left out; follow: the index says which arrays there are."""
    changed = path.with_name("changed.screc")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        whole = {name: old.read(name) for name in old.namelist()} | members
        index = json.loads(whole["index.json"])
        for number, block in enumerate(index["blocks"] if follow else ()):
            folder = f"blocks/{number:06}-{block['records']}/"
            names = [name.removeprefix(folder) for name, data in whole.items() if data and name.startswith(folder)]
            block["arrays"] = [name.removesuffix(".npy") for name in names]
        whole["index.json"] = json.dumps(index).encode()
        for name, data in whole.items():
            if data is not None:
                new.writestr(name, data)
    return changed


def array(*numbers, code="u8"):
    return to_npy(np.array(numbers, dtype=code))


B1 = "blocks/000001-100"
HEADER = b'{"format": "shadowcore recording", "version": 1, "stream": "x"}'


@pytest.mark.parametrize(
    ("members", "record", "expected"),
    [
        ({"recording.json": None}, None, "a member recording.json expected"),
        ({"recording.json": b"{"}, None, "a member recording.json expected"),
        ({"recording.json": b"[" * 100_000}, None, "a member recording.json expected"),
        ({"recording.json": b"[]"}, None, "an object in recording.json"),
        ({"recording.json": b'{"format": "other"}'}, None, "names no 'shadowcore recording'"),
        (
            {"recording.json": b'{"format": "shadowcore recording", "version": 3}'},
            None,
            "version 1 or 2 expected, not 3",
        ),
        (
            {"recording.json": HEADER},
            None,
            "a stream of guest, operations, program expected, not 'x'",
        ),
        (
            {"recording.json": HEADER.replace(b'"x"', b'"guest", "guest": {"cr0": -1}')},
            None,
            "a 64-bit number guest.cr0 expected, not -1",
        ),
        ({f"{B1}/addr.npy": array(*range(99))}, 100, "100 elements, or one, expected in addr, not 99"),
        ({f"{B1}/addr.npy": b"no array"}, 100, "block 1, a readable addr.npy expected"),
        ({f"{B1}/addr.npy": array(*range(100), code="f8")}, 100, "unsigned integers expected, not float64"),
        ({f"{B1}/addr.npy": array(*range(100))[:-1]}, 100, "100 elements of uint64 expected, there are 799 bytes"),
        ({f"{B1}/size.npy": array(1 << 16)}, 100, "size: numbers of 16 bits expected, not 0x10000"),
        ({f"{B1}/op.npy": array(4)}, 100, "an op from 0 to 3 expected, not 4"),
        ({f"{B1}/addr.pages.npy": array(1)}, 100, "addr.pages with addr.index and addr.offset"),
        (
            {f"{B1}/addr.pages.npy": array(1), f"{B1}/addr.index.npy": array(1), f"{B1}/addr.offset.npy": array(0)},
            100,
            "of 32 and 16 bits at most",
        ),
        (
            {
                f"{B1}/addr.pages.npy": array(1),
                f"{B1}/addr.index.npy": array(*[0] * 50, *[1] * 50, code="u1"),
                f"{B1}/addr.offset.npy": array(0, code="u1"),
            },
            100,
            "record 50 of the block: a page of addr.pages expected, not 1",
        ),
        ({f"{B1}/events.npy": None}, 100, "events of a program expected"),
        ({f"{B1}/events.npy": array(1)}, 100, "events of a program expected"),
        ({"blocks/000009-5/op.npy": array(1)}, None, "block 3 expected, there is none"),
        ({"blocks/000001-99/op.npy": array(1)}, None, "one number of records for block 1"),
        ({"blocks/x/op.npy": array(1)}, None, "NUMBER-RECORDS"),
        ({"blocks/000003-9999999/op.npy": array(1)}, None, "1048576 records at most"),
    ],
)
def test_wrong_members_are_named(small, members, record, expected):
    with pytest.raises(sc.TraceError) as caught:
        read(rewritten(small, members), ahead=1)
    assert caught.value.record == record
    assert expected in caught.value.expected
    assert "\n" not in str(caught.value)


def test_missing_members_are_named(small):
    with pytest.raises(sc.TraceError, match=r"record 100: block 1: arrays .*'addr'.* expected, as the index says"):
        Reader(rewritten(small, {f"{B1}/addr.npy": None}, follow=False))
    with zipfile.ZipFile(small) as archive:
        last = dict.fromkeys(name for name in archive.namelist() if name.startswith("blocks/000002"))
    with pytest.raises(sc.TraceError, match=r"3 blocks of 240 records expected, as the index says, not 2 of 200"):
        Reader(rewritten(small, last))
    (small.parent / "bare.screc").write_bytes(small.read_bytes().replace(b"index.json", b"index.jsom"))
    with pytest.raises(sc.TraceError, match="a member index"):
        Reader(small.parent / "bare.screc")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"at": 1, "kind": 1}], "events in order"),
        ([{"at": 0, "kind": 5}], "events in order"),
        ([{"at": 0, "kind": 1}, {"at": 5, "kind": 5}, {"at": 4, "kind": 5}], "events in order"),
        ([{"at": 0, "kind": 1}, {"at": 101, "kind": 5}], "events in order"),
        ([{"at": 0, "kind": 1}, {"at": 7, "kind": 99}], "an event from 1 to 10 expected, not 99"),
    ],
)
def test_wrong_events_are_named(small, rows, expected):
    events = np.zeros(len(rows), EVENT_DTYPE)
    for event, row in zip(events, rows, strict=True):
        for name, value in row.items():
            event[name] = value
    with pytest.raises(sc.TraceError, match=expected):
        read(rewritten(small, {f"{B1}/events.npy": to_npy(events)}))


def test_a_member_that_inflates_beyond_all_bounds_is_refused_unread(small):
    huge = rewritten(small, {f"{B1}/op.npy": bytes(MEMBER_MAX + 1)})
    with pytest.raises(sc.TraceError, match=r"bytes at most expected in blocks/000001-100/op.npy"):
        read(huge)


def test_what_is_no_recording(tmp_path):
    (tmp_path / "text").write_text("no recording")
    for path in (tmp_path / "text", tmp_path / "none", tmp_path):
        with pytest.raises(sc.TraceError):
            Reader(path)
        assert not recordings.is_recording(path)
    trace.load().head(50).save(tmp_path / "old.npz")
    assert not recordings.is_recording(tmp_path / "old.npz")
    with pytest.raises(sc.TraceError, match=r"a member recording.json expected"):
        Reader(tmp_path / "old.npz")


def test_a_reader_refuses_what_it_does_not_hold(small):
    assert recordings.is_recording(small)
    with Reader(small) as reader:
        assert len(reader) == 240
        assert "program, 240 records in 3 blocks" in repr(reader)
        with pytest.raises(sc.ConfigError, match="number"):
            reader.block(3)
        with pytest.raises(sc.TraceError, match="a recording of operations expected, not of a program"):
            reader.operations()
        with pytest.raises(sc.TraceError, match="with the machine that they start on"):
            trace.machine(reader)


def test_leaving_a_reader_in_the_middle_ends_its_threads(small):
    with Reader(small, ahead=3) as reader:
        iterator = iter(reader)
        assert next(iterator).records == 100
        iterator.close()
