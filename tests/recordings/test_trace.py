"""Recordings: what the reader refuses and derives, and what a replay of a real Linux guest comes to."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest
from places import LINUX_FORK, LINUX_MIX

import shadowcore as sc
from shadowcore.pagetables import PageTables
from shadowcore.recording import replay as trace

DESIGNS = ["native", "flush", "cached", "kvm-2007", "unsync"]


@pytest.fixture(scope="module")
def linux():
    """Debian's kernel, boot and 60 pipelines."""
    return trace.load(LINUX_FORK)


@pytest.fixture(scope="module")
def cut(linux):
    """The boot of that guest, and the beginning of its workload."""
    return linux.head(600_000)


def made(*rows, **changes):
    """A recording of (kind, flags, addr, value) rows, 64-bit mode, 64 frames."""
    kind, flags, addr, value = (list(column) for column in zip(*rows, strict=True))
    fields = {
        "name": "made",
        "kind": np.array(kind, dtype=np.uint8),
        "flags": np.array(flags, dtype=np.uint16),
        "insns": np.full(len(rows), 10, dtype=np.uint32),
        "addr": np.array(addr, dtype=np.uint64),
        "value": np.array(value, dtype=np.uint64),
        **{"cr0": 0x80010011, "cr4": 0x20, "efer": 0xD01, "nframes": 64},
    }
    return trace.Recording(**(fields | changes))


# -- recordings of Linux -----------------------------------------------------------------------------------


def test_linux_fork(linux):
    assert linux.operations == 1_262_787
    assert linux.instructions == 1_830_984_786
    assert linux.memory_size == 24546 * 4096
    assert linux.counts == {
        "cr3_loads": 18_891,
        "cr0_cr4_loads": 63,
        "table_stores": 404_728,
        "snapshot_words": 37_699,
        "tables": 2_769,
        "invlpg": 3_199,
        "accesses": 792_795,
        "tables_ended": 2_643,
        "efer_loads": 0,
        "invpcid": 0,
        "marks": 0,
    }
    assert sum(linux.counts.values()) == linux.operations
    assert linux.direct_map == 0xFFFF_8880_0000_0000
    assert linux.first_cr3 == 2059
    assert linux.first_user == 542_801
    assert "linux-fork" in repr(linux)


@pytest.mark.parametrize(
    ("file", "records", "marks", "first_user", "switches"),
    [(None, 2_376_834, 5, 816_652, 34_954), (LINUX_MIX, 1_462_109, 5, 821_611, 17_593)],
)
def test_the_same_guest_with_and_without_isolation(file, records, marks, first_user, switches):
    """What recorder/make-recording.sh made: with fetches, sizes, CPLs and marked phases. All of it reaches its gpas."""
    linux = trace.load(file)
    assert linux.name == ("linux-mix" if file else trace.BUNDLED)
    assert (linux.operations, linux.counts["marks"], linux.first_user) == (records, marks, first_user)
    assert linux.complete
    assert (linux.memory_size, linux.direct_map) == (128 << 20, 0xFFFF_8880_0000_0000)
    assert linux.counts["cr3_loads"] == switches
    assert linux.addr[linux.kind == trace.MARK].tolist() == [1, 2, 3, 4, 5]
    access = linux.kind == trace.ACCESS
    flags = linux.flags[access]
    fetch = flags & trace.FETCH != 0
    assert fetch.sum() > 200_000
    assert (flags & trace.CPL_KNOWN != 0).all()
    assert (flags[~fetch] >> 4 & 15 > 0).all()
    for design in DESIGNS:
        result = trace.replay(linux, design)
        assert (result.gpa_mismatches, result.faults, result.physical_stores) == (0, 0, 0), design


def test_arrays_cannot_be_changed(linux):
    for array in linux.arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_snapshot_words_are_told_from_late_stores(cut):
    """The flag SNAPSHOT means that the frame does not serve, or begins to: the former are stores."""
    serving, late = set(), 0
    rows = zip(*(a.tolist() for a in (cut.kind, cut.flags, cut.addr, cut.snapshot)), strict=True)
    for kind, flags, addr, snapshot in rows:
        frame = addr >> 12
        if kind == trace.TABLE:
            serving.add(frame)
        elif kind == trace.TABLE_END:
            serving.discard(frame)
        elif kind == trace.STORE:
            assert (frame in serving) == (snapshot or not flags & trace.SNAPSHOT)
            late += frame not in serving
        assert kind == trace.STORE or not snapshot
    assert late > 1000


def test_user_accesses(cut):
    assert not cut.user[: cut.first_user].any()
    assert cut.user[cut.first_user]
    user = cut.addr[cut.user]
    assert (user < 1 << 47).all()
    assert len(user) > 1000


def test_derived_indices_of_a_recording_without_them():
    recording = made((trace.INVLPG, 0, 0x1000, 0))
    assert recording.first_user is None
    assert recording.first_cr3 == 0
    assert not recording.user.any()
    assert not recording.snapshot.any()
    assert recording.direct_map == 0xFFFF_8880_0000_0000


# -- files -----------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path, linux):
    first = linux.head(5000)
    first.save(tmp_path / "first.npz")
    again = trace.load(tmp_path / "first.npz")
    assert (again.name, again.operations, again.nframes) == ("first", 5000, linux.nframes)
    for name, array in again.arrays.items():
        assert (array == linux.arrays[name][:5000]).all()
    assert (again.cr0, again.cr4, again.efer) == (linux.cr0, linux.cr4, linux.efer)


@pytest.mark.parametrize("records", [0, -1, 1 << 40, 1.5])
def test_head_of_no_length(linux, records):
    with pytest.raises(sc.ConfigError, match="records"):
        linux.head(records)


BAD_RECORDS = [
    ((0, 0, 0, 0), "a kind from 1 to 10 expected, not kind 0x0"),
    ((11, 0, 0, 0), "a kind from 1 to 10 expected, not kind 0xb"),
    ((trace.STORE, 0, 0x1000, 0), "a table level from 1 to 5 in the flags expected, not flags 0x0"),
    ((trace.STORE, 6, 0x1000, 0), "a table level from 1 to 5"),
    ((trace.TABLE, 9, 0x1000, 0), "a table level from 1 to 5"),
    ((trace.TABLE_END, 0, 0x1000, 0), "a table level from 1 to 5"),
    ((trace.STORE, 1 | 3 << 4, 0x1000, 0), "a store of 1, 2, 4 or 8 bytes"),
    ((trace.STORE, 1, 0x1004, 0), "a store within one aligned entry of 8 bytes expected, not addr 0x1004"),
    ((trace.STORE, 1 | 4 << 4, 0x1006, 0), "a store within one aligned entry"),
    ((trace.TABLE, 1, 0x1008, 0), "a multiple of 4096 as the gpa of a table expected, not addr 0x1008"),
    ((trace.STORE, 1, 64 << 12, 0), "a gpa below the end of memory, 0x40000 expected, not addr 0x40000"),
    ((trace.TABLE, 1, 1 << 63, 0), "a gpa below the end of memory"),
    ((trace.TABLE_END, 1, 64 << 12, 0), "a gpa below the end of memory"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_RECORDS)
def test_bad_records_are_named(tmp_path, row, expected):
    good = (trace.LOAD_CR3, 0, 0x1000, 0)
    with pytest.raises(sc.TraceError) as caught:
        made(good, good, row, good, row)
    assert (caught.value.file, caught.value.record) == ("made", 2)
    assert expected in caught.value.expected
    arrays = made(*[good] * 5).arrays | dict.fromkeys(("cr0", "cr4", "efer"), 0) | {"nframes": 64}
    for name, value in zip(("kind", "flags", "addr", "value"), row, strict=True):
        arrays[name] = arrays[name].copy()
        arrays[name][2] = value
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(sc.TraceError) as caught:
        trace.load(tmp_path / "bad.npz")
    assert (caught.value.file, caught.value.record) == (str(tmp_path / "bad.npz"), 2)
    assert expected in caught.value.expected


def test_bad_snapshot_word():
    with pytest.raises(sc.TraceError, match=r"record 1: a multiple of 8 as the gpa of a snapshot's word"):
        made((trace.TABLE, 1, 0x1000, 0), (trace.STORE, 1 | trace.SNAPSHOT, 0x1004, 0))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": np.zeros(1, np.uint16)}, "array 'kind': one dimension of uint8 expected, not 1 of uint16"),
        ({"addr": np.zeros((1, 1), np.uint64)}, "array 'addr': one dimension of uint64 expected, not 2"),
        ({"addr": np.zeros(2, np.uint64)}, "array 'addr': 1 records expected, as in 'kind', not 2"),
        ({"nframes": 0}, "'nframes': one integer from 1 to 0x10000000000 expected"),
        ({"cr0": -1}, "'cr0': one integer from 0"),
        ({"efer": 1.5}, "'efer': one integer from 0"),
    ],
)
def test_recordings_that_cannot_be(changes, expected):
    with pytest.raises(sc.TraceError) as caught:
        made((trace.INVLPG, 0, 0, 0), **changes)
    assert expected in caught.value.expected


def test_no_records_and_no_file(tmp_path):
    made((trace.INVLPG, 0, 0, 0)).save(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as file:
        arrays = {k: v[:0] if v.ndim else v for k, v in file.items()}
    np.savez(tmp_path / "empty.npz", **arrays)
    with pytest.raises(sc.TraceError, match="at least one record"):
        trace.load(tmp_path / "empty.npz")
    with pytest.raises(sc.TraceError, match="No such file"):
        trace.load(tmp_path / "none.npz")
    with pytest.raises(sc.TraceError, match="directory"):
        trace.load(tmp_path)


def test_damaged_headers_are_trace_errors(tmp_path, linux):
    """Every byte of the archive's last part, where its directory is, and samples of the rest."""
    linux.head(50).save(tmp_path / "good.npz")
    good = (tmp_path / "good.npz").read_bytes()
    bad = tmp_path / "bad.npz"
    refused = 0
    for at in [*range(0, len(good) - 300, 7), *range(len(good) - 300, len(good))]:
        bad.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            trace.load(bad)
        except sc.TraceError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 93])
def test_compression_that_no_writer_of_ours_has_used_is_refused(tmp_path, linux, method):
    """93 is Zstandard, which zipfile knows from Python 3.14 on, with an exception of its own for damaged data."""
    path = tmp_path / "other.npz"
    linux.head(50).save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 10] = method  # of the first member, in the directory
    path.write_bytes(data)
    with pytest.raises(sc.TraceError, match=rf"stored or deflated data expected, not method {method}"):
        trace.load(path)


# -- replay ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
def test_every_access_reaches_the_recorded_gpa(cut, design):
    result = trace.replay(cut, design)
    assert result.design == design
    assert result.gpa_mismatches == 0
    assert result.mismatch_records == ()
    assert result.faults == 0
    assert result.snapshot_words == cut.counts["snapshot_words"]
    assert result.table_stores == cut.counts["table_stores"]
    assert 0 < result.accesses <= cut.counts["accesses"]
    # Late in the recorded boot the direct map reaches every table.
    assert result.physical_stores < 2000
    exits = result.whole.exits
    assert sum(exits.values()) == result.whole.exits_total
    if design == "native":
        assert result.whole.exits_total == 0
        assert result.pages_max == 0
    else:
        assert exits["cr3"] == cut.counts["cr3_loads"]
        assert 0 < result.pages_mean <= result.pages_max <= 256
        assert (exits["invlpg"] > 0) == (design in ("flush", "unsync"))
        assert (exits["emulate"] > 0) == (design != "flush")


def test_parts_add_up(cut):
    result = trace.replay(cut, "cached")
    whole, boot, workload = result.whole, result.boot, result.workload
    assert boot.records == cut.first_user
    assert boot.records + workload.records == whole.records == cut.operations
    assert boot.instructions + workload.instructions == whole.instructions == cut.instructions
    for name, total in whole.counters.items():
        assert boot.counters[name] + workload.counters[name] == total
    assert whole.exits_per_million == pytest.approx(1e6 * whole.exits_total / cut.instructions)
    plain = json.loads(json.dumps(result.as_dict()))
    assert plain["exits_total"] == plain["boot"]["exits_total"] + plain["workload"]["exits_total"]
    assert plain["emulated"] == plain["exits"]["emulate"]


def test_slices_do_not_show(cut, monkeypatch):
    short = cut.head(100_000)
    monkeypatch.setattr(trace, "SLICE", 777)
    sliced = trace.replay(short, "cached").as_dict()
    monkeypatch.setattr(trace, "SLICE", 1 << 30)
    whole = trace.replay(short, "cached").as_dict()
    del sliced["seconds"], whole["seconds"]
    assert sliced == whole


def test_progress(cut):
    seen = []
    trace.replay(cut, "native", progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {cut.operations}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (cut.operations, cut.operations)
    assert len(seen) >= cut.operations // trace.SLICE


@pytest.mark.parametrize("design", DESIGNS)
def test_audits_find_nothing(cut, design):
    short = cut.head(60_000)
    result = trace.replay(short, design, audit_every=7_000)
    assert result.audits == 9
    assert result.violations == ()
    assert result.whole == trace.replay(short, design).whole


def test_a_replay_ends_where_an_audit_fails(cut, monkeypatch):
    audit = sc.VM.audit
    calls = []

    def third_fails(vm):
        calls.append(vm)
        report = audit(vm)
        return report if len(calls) < 3 else type(report)(("I9: as asked", "another"), 2, report.sptes)

    monkeypatch.setattr(sc.VM, "audit", third_fails)
    result = trace.replay(cut, "cached", audit_every=5_000)
    assert result.audits == 3
    assert result.whole.records == 15_000
    assert result.workload is None
    assert result.violations == ((15_000, "I9: as asked"), (15_000, "another"))
    assert result.as_dict()["violations"][1] == {"record": 15_000, "violation": "another"}


@pytest.mark.parametrize("design", ["native", "cached", "unsync"])
def test_start_at_the_workload(cut, design):
    """The tables are put in place, the shadow begins empty; what the guest sees is the same."""
    late = trace.replay(cut, design, start=cut.first_user)
    assert late.gpa_mismatches == late.faults == 0
    assert late.boot is None
    assert late.whole == late.workload
    assert late.whole.records == cut.operations - cut.first_user
    assert late.whole.instructions == trace.replay(cut, design).workload.instructions


@pytest.mark.parametrize("start", [1, 2058, 2059, 2060, 51_206, 504_360, 595_000])
def test_start_anywhere(cut, start):
    result = trace.replay(cut, "cached", start=start, stop=min(start + 5000, cut.operations))
    assert result.gpa_mismatches == result.faults == 0


@pytest.mark.parametrize("record", [0, 1000, 2059, 51_300, 504_365, 600_000])
def test_tables_at_a_record(cut, record):
    """Against a slow model: a dict of words."""
    model = {}
    arrays = (cut.kind, cut.addr, cut.value)
    stop = record
    while stop < cut.operations and cut.snapshot[stop]:
        stop += 1
    for kind, addr, value in zip(*(a[:stop].tolist() for a in arrays), strict=True):
        if kind == trace.TABLE:
            for word in range(addr >> 3, (addr >> 3) + 512):
                model.pop(word, None)
        elif kind == trace.STORE:
            model[addr >> 3] = value
    words, values, _ = trace._tables_at(cut, record)
    assert dict(zip(words.tolist(), values.tolist(), strict=True)) == model


def test_stop(cut):
    result = trace.replay(cut, "cached", stop=30_000)
    assert result.whole.records == 30_000
    assert result.workload is None
    assert result.whole == trace.replay(cut.head(30_000), "cached").whole


def test_pool(cut):
    """A smaller pool is another cost and the same guest. Without one, native does not care."""
    small = trace.replay(cut, "cached", pool=16)
    assert small.pages_max <= 16
    assert small.whole.counters["mmu_recycled"] > 0
    assert small.gpa_mismatches == small.faults == 0
    assert trace.replay(cut, sc.Shadow.cached(pool_pages=16)).whole == small.whole
    assert trace.replay(cut, "native", pool=16).gpa_mismatches == 0


def test_a_wrong_gpa_is_counted_and_named(cut):
    short = cut.head(20_000)
    value = short.value.copy()
    accesses = np.flatnonzero(short.kind == trace.ACCESS)[[100, 5000, 9000]]
    value[accesses] ^= np.uint64(0x1000)
    fields = {name: getattr(short, name) for name in ("cr0", "cr4", "efer", "nframes", "name")}
    changed = trace.Recording(**(short.arrays | {"value": value}), **fields)
    for design in ("native", "cached", "unsync"):
        result = trace.replay(changed, design)
        assert result.gpa_mismatches == 3
        assert result.mismatch_records == tuple(accesses.tolist())


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("mmu", {"mmu": "fastest"}),
        ("audit_every", {"audit_every": -1}),
        ("start", {"start": -1}),
        ("start", {"start": 600_000}),
        ("stop", {"stop": 0}),
        ("stop", {"stop": 600_001}),
        ("stop", {"start": 50, "stop": 50}),
        ("pool_pages", {"pool": 1}),
    ],
)
def test_bad_arguments(cut, field, arguments):
    with pytest.raises(sc.ConfigError, match=rf"^{field}"):
        trace.replay(cut, **arguments)


def test_registers_that_no_processor_has():
    with pytest.raises(sc.TraceError, match=r"made, record 0: registers .* cr4 0x0"):
        trace.replay(made((trace.INVLPG, 0, 0x1000, 0), cr4=0), "cached")


# -- small guests ----------------------------------------------------------------------------------------

OLD, NEW = 0x20000, 0x3F000  # a page, and the frame of a table that ceases to serve


def small_guest(*rows):
    """Tables (4-level, all memory mapped at the default direct map, and one user page), then the rows."""
    ram = np.zeros(64 * 4096, dtype=np.uint8)
    tables = PageTables(ram, "64", allocate=range(1, 16))
    tables.map(0xFFFF_8880_0000_0000, 0, 64 * 4096, "rw", 4096)
    tables.map(0x400000, OLD, 4096, "rwu")
    words = ram.view(np.uint64)
    build = []
    for gfn, level in tables.tables.items():
        build.append((trace.TABLE, level, gfn << 12, 0))
        used = np.flatnonzero(words[gfn * 512 : gfn * 512 + 512]).tolist()
        build += [(trace.STORE, level | trace.SNAPSHOT, (gfn << 12) + 8 * i, int(words[gfn * 512 + i])) for i in used]
    leaf = tables.entry(0x400000)
    rows = [row(leaf) if callable(row) else row for row in rows]
    return made(*build, (trace.LOAD_CR3, 0, tables.cr3, 0), *rows), leaf


READ = (trace.ACCESS, trace.USER, 0x400008, OLD + 8)


@pytest.mark.parametrize("design", DESIGNS[:3])
@pytest.mark.parametrize("pcide", [0, 1 << 17])
def test_recordings_with_pcids_or_ignored_bits_in_cr3(design, pcide):
    """From the start, from the middle, and with bit 63 where there are PCIDs: the same accesses find the same."""
    plain, _ = small_guest(READ)
    root = int(plain.addr[plain.kind == trace.LOAD_CR3][0])
    loads = [(trace.LOAD_CR3, 0, root | 5, 0), (trace.LOAD_CR3, 0, root | 6 | (1 << 63 if pcide else 0), 0), READ]
    recording, _ = small_guest(READ, *loads)
    recording = dataclasses.replace(recording, cr4=recording.cr4 | pcide)
    for start in (0, recording.operations - 2, recording.operations - 1):
        result = trace.replay(recording, design, start=start)
        assert (result.faults, result.gpa_mismatches, result.accesses) == (0, 0, 2 if start == 0 else 1)


def test_a_load_of_cr0_and_cr4_without_et_is_one_of_cr4():
    """ET stays set whatever a recording says, and what CR0 has already is not loaded again."""
    recording, _ = small_guest(READ, (trace.LOAD_CR, 0, 0x80010001, 0xA0), (trace.LOAD_CR, 0, 0x80010001, 0x20))
    exits = trace.replay(dataclasses.replace(recording, cr0=0x80010001), "cached").whole.counters
    assert (exits["exits_cr0"], exits["exits_cr4"]) == (0, 2)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_store_remaps_a_page(design):
    recording, leaf = small_guest(
        READ,
        lambda leaf: (trace.STORE, 1, leaf.gpa, leaf.value ^ OLD ^ 0x21000),
        (trace.INVLPG, 0, 0x400000, 0),
        (trace.ACCESS, trace.USER | trace.WRITE, 0x400010, 0x21010),
    )
    result = trace.replay(recording, design)
    assert result.gpa_mismatches == result.faults == result.physical_stores == 0
    assert result.table_stores == 1
    assert result.whole.counters["pf_emulate"] == (design in ("cached", "kvm-2007"))
    assert leaf.level == 1


def test_the_access_that_carries_a_store_is_not_done_twice():
    def access(leaf):
        return (trace.ACCESS, trace.WRITE, 0xFFFF_8880_0000_0000 + leaf.gpa, leaf.gpa)

    recording, _ = small_guest(READ, access, lambda leaf: (trace.STORE, 1, leaf.gpa, leaf.value | 0x40))
    result = trace.replay(recording, "cached")
    assert (result.accesses, result.table_stores, result.gpa_mismatches) == (1, 1, 0)
    assert result.whole.exits["emulate"] == 1


@pytest.mark.parametrize("size", [1, 0])
def test_late_stores_to_a_table_are_done(size):
    """A table whose frame has ceased to serve is cleared: the guest does it, and the shadow MMU sees it."""
    recording, _ = small_guest(
        READ,
        lambda leaf: (trace.TABLE_END, 1, leaf.gpa & ~0xFFF, 0),
        lambda leaf: (trace.STORE, 1 | trace.SNAPSHOT | size << 4, leaf.gpa, leaf.value & ~0xFF * size),
    )
    result = trace.replay(recording, "cached")
    assert result.table_stores == 1
    assert result.whole.exits["emulate"] == 1


def test_a_user_access_to_the_kernel_is_a_fault():
    recording, _ = small_guest(READ, (trace.ACCESS, trace.USER, 0x401000, 0x5000))
    for design in ("native", "cached", "unsync"):
        result = trace.replay(recording, design)
        assert (result.faults, result.gpa_mismatches) == (1, 1)
        assert result.mismatch_records == (recording.operations - 1,)


def test_a_table_that_the_guest_cannot_reach_is_stored_to_at_its_gpa(monkeypatch):
    recording, _ = small_guest(
        READ,
        lambda leaf: (trace.STORE, 1, leaf.gpa, leaf.value),
    )
    monkeypatch.setattr(trace.Recording, "direct_map", 0xFFFF_9000_0000_0000)
    result = trace.replay(recording, "cached")
    assert result.physical_stores == result.table_stores == 1
    assert result.gpa_mismatches == 0
