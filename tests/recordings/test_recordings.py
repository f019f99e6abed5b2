"""The file format of recordings: what is written is read again, also where writing has failed; memory is bounded."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
from commands import ENVIRONMENT
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import REGISTERS, addresses, guest, read

import shadowcore as sc
from shadowcore.files import Replacement
from shadowcore.recording import pages as columns
from shadowcore.recording import replay as trace
from shadowcore.recordings import EVENT_DTYPE, GUEST, OPERATIONS, PROGRAM, STREAMS, Event, Reader, Writer

# -- pages -----------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0, 20).map(lambda n: n << 12), max_size=60),
    st.integers(0, 70),
)
def test_pages_are_split_and_joined(addresses, room):
    addr = np.array(addresses, dtype=np.uint64)
    pages = np.empty(room, dtype=np.uint64)
    index, offset = np.empty(len(addr), dtype=np.uint16), np.empty(len(addr), dtype=np.uint16)
    used = columns.split_pages(addr, pages, index, offset)
    numbers = list(dict.fromkeys(address >> 12 for address in addresses))
    if len(numbers) > room:
        assert used == -1
        return
    assert pages[:used].tolist() == numbers
    assert index.tolist() == [numbers.index(address >> 12) for address in addresses]
    assert offset.tolist() == [address & 4095 for address in addresses]
    for code in ("u1", "u2", "u4"):
        joined = np.empty(len(addr), dtype=np.uint64)
        assert columns.join_pages(pages[:used], index.astype(code), offset, joined) == len(addr)
        assert (joined == addr).all()


def test_more_pages_than_an_index_of_16_bits_can_number():
    addr = np.arange(70_000, dtype=np.uint64) << np.uint64(12)
    halves = [np.empty(70_000, dtype=np.uint16) for _ in range(2)]
    assert columns.split_pages(addr, np.empty(100_000, dtype=np.uint64), *halves) == -1
    assert (
        columns.split_pages(addr[: 1 << 16], np.empty(1 << 16, np.uint64), *(h[: 1 << 16] for h in halves)) == 1 << 16
    )


def test_an_index_without_a_page_is_found():
    index = np.array([0, 1, 2, 0], dtype=np.uint8)
    joined = np.zeros(4, dtype=np.uint64)
    two = np.ones(2, dtype=np.uint64)
    assert columns.join_pages(two, index, np.zeros(4, dtype=np.uint16), joined) == 2
    assert joined.tolist() == [4096, 4096, 0, 0]
    with pytest.raises(ValueError, match="of one length"):
        columns.join_pages(two, index, np.zeros(3, dtype=np.uint16), joined)
    with pytest.raises(ValueError, match="of one length"):
        columns.split_pages(two, two.copy(), np.zeros(1, dtype=np.uint16), np.zeros(2, dtype=np.uint16))


# -- round trips -----------------------------------------------------------------------------------------


def column(code, length):
    highest = int(np.iinfo(code).max)
    numbers = st.integers(0, highest)
    near = numbers.flatmap(
        lambda base: st.lists(st.integers(base, min(base + 9000, highest)), min_size=length, max_size=length)
    )
    same = numbers.map(lambda number: [number] * length)
    return (st.lists(numbers, min_size=length, max_size=length) | near | same).map(lambda x: np.array(x, dtype=code))


@st.composite
def streams_(draw):
    stream = draw(st.sampled_from(sorted(STREAMS)))
    pieces = []
    for length in draw(st.lists(st.integers(0, 40), max_size=4)):
        piece = {name: draw(column(code, length)) for name, code in STREAMS[stream].items()}
        if stream == PROGRAM:
            piece["op"] %= 4
        events = []
        if stream == PROGRAM:
            for kind, process in draw(st.lists(st.tuples(st.sampled_from(list(Event)), st.integers(0, 3)), max_size=3)):
                fields = {name: draw(st.integers(0, (1 << 32) - 1)) for name in ("addr", "size", "prot")}
                events.append((kind, process, {} if kind == Event.RUN else fields))
        pieces.append((piece, events))
    return stream, draw(st.sampled_from([1, 7, 64, 1 << 18])), pieces


@settings(max_examples=60, deadline=None)
@given(streams_())
def test_what_is_written_is_read(tmp_path_factory, made):
    stream, block, pieces = made
    path = tmp_path_factory.mktemp("recording") / "a.screc"
    expected, wanted, process, position = {name: [] for name in STREAMS[stream]}, [], 0, 0
    with Writer(path, stream, guest=guest(stream), block=block, source={"tool": "hypothesis"}) as writer:
        for piece, events in pieces:
            writer.write(**piece)
            position += len(next(iter(piece.values())))
            for name, part in piece.items():
                expected[name] += part.tolist()
            for kind, number, fields in events:
                writer.event(kind, number, **fields)
                process = number if kind == Event.RUN else process
                row = dict.fromkeys(EVENT_DTYPE.names, 0) | fields | {"at": position, "kind": kind, "process": number}
                wanted.append(tuple(row.values()))
    for ahead in (0, 2):
        whole, events, reader = read(path, ahead=ahead)
        assert {name: part.tolist() for name, part in whole.items()} == expected
        assert all(part.dtype == np.dtype(STREAMS[stream][name]) for name, part in whole.items())
        # Each block begins with the process that runs; such events are more than were written.
        assert [row for row in events if row[1] != Event.RUN] == [row for row in wanted if row[1] != Event.RUN]
        assert reader.complete
        assert (reader.stream, reader.name, reader.source) == (stream, "a", {"tool": "hypothesis"})
    assert json.loads(zipfile.ZipFile(path).read("index.json"))["records"] == position


def test_accesses_belong_to_the_process_that_runs(tmp_path):
    """Whatever the blocks, segments give the same accesses to the same processes, between the same events."""

    def of(block):
        path = tmp_path / f"{block}.screc"
        with Writer(path, PROGRAM, block=block) as writer:
            for n in range(40):
                writer.event(Event.RUN, n % 3)
                writer.write(op=np.full(n % 7, n % 4), size=1, addr=np.arange(n % 7) + 100 * n)
                if n % 5 == 0:
                    writer.event(Event.MMAP, n % 3, file=f"/lib/{n % 2}", addr=n << 12, size=4096, prot=3, flags=2)
        found = []
        with Reader(path) as reader:
            for part in (part for block in reader for part in block.segments()):
                if isinstance(part, tuple):
                    process, op, _, addr = part
                    found += [(process, *row) for row in zip(op.tolist(), addr.tolist(), strict=True)]
                else:
                    found.append((int(part["process"]), reader.files[part["file"] - 1], int(part["addr"])))
        return found

    whole = of(1 << 18)
    assert len(whole) == sum(n % 7 for n in range(40)) + 8
    assert (2, 2, 201) in whole
    assert (2, 2, 202) not in whole
    assert (2, 1, 500) in whole
    assert of(1) == of(5) == whole


def test_events_without_accesses(tmp_path):
    """More of them than a block has room for, and no access at all."""
    with Writer(tmp_path / "a.screc", PROGRAM, block=10) as writer:
        for n in range(35):
            writer.event(Event.MUNMAP, 0, addr=n)
    whole, events, reader = read(tmp_path / "a.screc")
    assert (len(whole["addr"]), reader.records) == (0, 0)
    assert reader.block_count > 3
    assert [row[3] for row in events if row[1] == Event.MUNMAP] == list(range(35))


def test_blocks_of_one_process(tmp_path):
    with Writer(tmp_path / "a.screc", PROGRAM, block=10) as writer:
        for process in (0, 1, 0, 2):
            writer.event(Event.RUN, process)
            writer.write(op=np.zeros(20, "u1"), size=1, addr=process)
    with Reader(tmp_path / "a.screc") as reader:
        assert [block.first for block in reader.blocks(process=1)] == [20, 30]
        assert [block.first for block in reader.blocks(process=2)] == [60, 70]
        assert [block.first for block in reader.blocks(first=65)] == [60, 70]


def test_operations_run_as_they_were_recorded(tmp_path):
    """The machine that a recording starts on, and its operations, give the same results as the original."""
    vm = sc.VM(memory="1MiB", mmu="cached")
    tables = sc.PageTables(vm.memory, mode="64", allocate=range(128, 200))
    tables.map(0x400000, 0x10000, 0x8000, "rwu")
    cpu = vm.vcpus[0]
    for name, value in tables.registers.items():
        setattr(cpu, name, value)
    vm.write_physical(0x10008, b"recorded")
    rng = np.random.default_rng(1)
    ops = np.zeros(1000, np.dtype([*sc.OP_DTYPE.descr, ("expected", "<u8")]))
    ops["op"] = rng.choice([0, 1, 2, sc.Op.CMPXCHG, sc.Op.ADD], 1000)
    ops["size"], ops["user"] = 8, rng.integers(0, 2, 1000)
    ops["addr"] = 0x400000 + 8 * rng.integers(0, 0x9000 // 8, 1000)
    ops["value"] = rng.integers(0, 1 << 63, 1000)
    ops["expected"] = rng.integers(0, 2, 1000)
    path = tmp_path / "ops.screc"
    with Writer(path, OPERATIONS, vm=vm, block=300) as writer:
        writer.write(ops)
    result = cpu.run(ops)
    with Reader(path) as reader:
        again = trace.machine(reader, "cached")
        parts = [again.vcpus[0].run(batch) for batch in reader.operations()]
        assert [len(part) for part in parts] == [300, 300, 300, 100]
        assert next(reader.operations()).dtype.names == ("op", "user", "size", "addr", "value", "expected")
        whole, _, _ = read(path)
        assert all((whole[name] == ops[name]).all() for name in ops.dtype.names)
    for name in ("outcome", "error_code", "gpa", "value", "exits", "emulated"):
        assert (np.concatenate([getattr(part, name) for part in parts]) == getattr(result, name)).all()
    assert (again.memory.bytes == vm.memory.bytes).all()
    assert 0 < int((result.outcome == 1).sum()) < 1000


@pytest.mark.parametrize("design", ["native", "cached", "unsync", "adaptive"])
@pytest.mark.parametrize("cr3", [5, 0xFE0, (4 << 30) + 5])
@pytest.mark.parametrize("pcide", [0, 1 << 17])
def test_machines_with_pcids_ignored_bits_or_a_high_root(tmp_path, design, cr3, pcide):
    """What CR3 and CR4 hold in long mode alone is there again; a root above 4 GiB (there is no memory, so all is
    absent) leaves no page of another root in the pool."""
    vm = sc.VM("1MiB", design)
    cpu = vm.vcpus[0]
    cpu.efer, cpu.cr4, cpu.cr0 = 0x100, 0x20, 0x80000001
    cpu.cr4 |= pcide
    cpu.cr3 = cr3
    with Writer(tmp_path / "ops.screc", OPERATIONS, vm=vm):
        pass
    with Reader(tmp_path / "ops.screc") as reader:
        again = trace.machine(reader, design)
    for name in ("cr0", "cr3", "cr4", "efer"):
        assert getattr(again.vcpus[0], name) == getattr(cpu, name)
    if design == "cached":
        pages = again.mmu.pages
        assert pages["gfn"][pages["level"] == 4].tolist() == [cr3 >> 12]
    assert again.audit().ok


def test_two_recordings_of_the_same_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        with Writer(tmp_path / name, OPERATIONS, name="same") as writer:
            writer.write(op=0, size=8, addr=np.arange(1000) * 64)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_numpy_and_zip_alone_can_read_it(tmp_path):
    addr = np.arange(3000) // 10 * (1 << 20) + np.arange(3000) % 9
    with Writer(tmp_path / "a.screc", OPERATIONS) as writer:
        writer.write(op=1, size=8, addr=addr)
    with np.load(tmp_path / "a.screc") as archive:
        folder = "blocks/000000-3000"
        assert archive[f"{folder}/op"].tolist() == [1]
        pages = archive[f"{folder}/addr.pages"] << 12
        assert (pages[archive[f"{folder}/addr.index"]] + archive[f"{folder}/addr.offset"] == addr).all()
        assert f"{folder}/value" not in archive


# -- wrong use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("stream", {"stream": "music"}),
        ("guest", {"stream": GUEST}),
        ("guest", {"stream": PROGRAM, "guest": REGISTERS}),
        ("block", {"stream": PROGRAM, "block": 0}),
        ("block", {"stream": PROGRAM, "block": (1 << 20) + 1}),
        ("vm", {"stream": PROGRAM, "vm": sc.VM(memory=4096)}),
    ],
)
def test_writers_that_cannot_be(tmp_path, what, arguments):
    with pytest.raises(sc.ConfigError, match=rf"^{what}"):
        Writer(tmp_path / "a.screc", **arguments)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ("has op, size, addr", {"colour": np.zeros(3)}),
        ("one length", {"op": np.zeros(3, "u1"), "addr": np.zeros(4, "u8")}),
        ("one length", {"op": 0}),
        ("unsigned integers", {"addr": np.zeros(3)}),
        ("numbers from 0 to 0xffff", {"size": np.full(3, 1 << 16)}),
        ("numbers from 0", {"addr": np.full(3, -1)}),
    ],
)
def test_columns_that_cannot_be(tmp_path, expected, arguments):
    with Writer(tmp_path / "a.screc", PROGRAM) as writer:
        writer.write(addr=np.arange(5))
        with pytest.raises(sc.ConfigError, match=expected):
            writer.write(**arguments)
    assert read(tmp_path / "a.screc")[0]["addr"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(sc.ConfigError, match="closed"):
        writer.write(addr=np.arange(5))


def test_events_are_of_programs(tmp_path):
    with Writer(tmp_path / "a.screc", OPERATIONS) as writer, pytest.raises(sc.ConfigError, match="event"):
        writer.event(Event.RUN, 0)


# -- failures while writing ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_written_before_an_interruption_is_kept(tmp_path, error):
    path = tmp_path / "a.screc"
    path.write_text("an older file")

    def interrupted(records):
        with Writer(path, OPERATIONS, block=100) as writer:
            if records:
                writer.write(addr=addresses(records))
            raise error

    with pytest.raises(error):
        interrupted(0)
    assert path.read_text() == "an older file"
    with pytest.raises(error):
        interrupted(250)
    whole, _, reader = read(path)
    assert not reader.complete
    assert "incomplete" in repr(reader)
    assert (whole["addr"] == addresses(250)).all()
    assert os.listdir(tmp_path) == ["a.screc"]


@pytest.mark.parametrize("limit", [300, 2_000, 9_000, 40_000, 60_123])
def test_a_full_disk(tmp_path, limit):
    """In a process whose files cannot grow beyond a limit. What is kept ends at a block and is marked as incomplete."""
    program = f"""
        import resource, sys
        import numpy as np
        import shadowcore as sc
        from shadowcore.recordings import Writer
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            with Writer("a.screc", "operations", block=500) as writer:
                for n in range(100):
                    writer.write(addr=np.random.default_rng(n).integers(0, 1 << 63, 500, dtype=np.uint64))
        except sc.TraceError as error:
            sys.exit(f"{{error.record}} {{error}}")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "room for the recording expected" in done.stderr
    if limit < 5_000:
        assert "nothing is kept" in done.stderr
        assert not os.listdir(tmp_path)
        return
    whole, _, reader = read(tmp_path / "a.screc")
    assert not reader.complete
    assert f" {reader.records:,} records are kept" in done.stderr
    kept = reader.records // 500
    assert reader.records == 500 * kept
    assert limit // 4200 - 2 <= kept <= limit // 4000
    expected = [np.random.default_rng(n).integers(0, 1 << 63, 500, dtype=np.uint64) for n in range(kept)]
    assert (whole["addr"] == np.concatenate(expected)).all()
    assert (tmp_path / "a.screc").stat().st_size <= limit


def test_a_device_without_room():
    with pytest.raises(sc.TraceError, match=r"/dev/full.*room for the recording expected.*No space left"):
        Writer("/dev/full", OPERATIONS)
    assert os.path.exists("/dev/full")
    assert not os.path.exists("/dev/full.partial")


def test_a_path_that_cannot_be(tmp_path):
    with pytest.raises(sc.TraceError, match="No such file"):
        Writer(tmp_path / "none" / "a.screc", OPERATIONS)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_path_that_cannot_be_leaves_nothing_to_finalize(tmp_path):
    """Newer versions of Python report what is raised while an object goes."""
    output = None
    try:
        output = Replacement(tmp_path / "none" / "a")
    except FileNotFoundError as error:
        output = error.__traceback__.tb_next.tb_frame.f_locals["self"]
    output.close()
    assert output.closed


def test_a_killed_writer_leaves_no_recording(tmp_path):
    program = """
        import os, signal
        import numpy as np
        from shadowcore.recordings import Writer
        writer = Writer("a.screc", "operations", block=500)
        writer.write(addr=np.arange(5000))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=ENVIRONMENT, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["a.screc.partial"]
    with pytest.raises(sc.TraceError, match="cut short"):
        Reader(tmp_path / "a.screc.partial")


# -- memory ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """40 million operations, written and run: 200 MB suffice, whatever the length."""
    program = """
        import resource, sys
        import numpy as np
        import shadowcore as sc
        from shadowcore.recordings import Reader, Writer
        N, PART = 40_000_000, 1_000_000
        if sys.argv[1] == "write":
            vm = sc.VM(memory="16MiB")
            tables = sc.PageTables(vm.memory, mode="64", allocate=range(3000, 4096))
            tables.map(0x400000, 0, 1024 * 4096, "rwu")
            for name, value in tables.registers.items():
                setattr(vm.vcpus[0], name, value)
            rng = np.random.default_rng(0)
            with Writer("a.screc", "operations", vm=vm) as writer:
                for _ in range(N // PART):
                    addr = 0x400000 + rng.integers(0, 1024 * 4096 - 8, PART)
                    writer.write(op=rng.integers(0, 2, PART), user=1, size=8, addr=addr)
        else:
            with Reader("a.screc") as reader:
                cpu = sc.trace.machine(reader).vcpus[0]
                done = sum(int((cpu.run(ops, data=False).outcome == 0).sum()) for ops in reader.operations())
                assert done == N, done
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    for what in ("write", "read"):
        command = [sys.executable, "-c", textwrap.dedent(program), what]
        done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 200 << 10


def test_limits_of_this_process_are_as_they_were():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
