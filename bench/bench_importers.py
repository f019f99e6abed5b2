"""Importers and recordings: lines and instructions a second, and what reading a recording adds to a replay.

python -m bench.bench_importers [TEXT OF LACKEY] prints the figures of docs/recordings.md.
"""

import lzma
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import shadowcore as sc
from shadowcore.recording import importers
from shadowcore.recording.importers import lackey_text as lackey
from shadowcore.recordings import OPERATIONS, PROGRAM, Reader, Writer

LINES = 1_000_000


def text(lines=LINES):
    """Lines as a program makes them: a loop's fetches, a stack, a heap."""
    rng = np.random.default_rng(0)
    pc = 0x4001000 + 4 * (np.arange(lines) % 700)
    data = np.where(rng.integers(0, 3, lines) == 0, 0x1FFEFFE000 + 8 * rng.integers(0, 90, lines), 0x4A00000)
    data += 8 * rng.integers(0, 5000, lines)
    kinds = rng.choice(4, lines, p=[0.7, 0.2, 0.08, 0.02])
    heads = (b"I  ", b" L ", b" S ", b" M ")
    rows = zip(kinds.tolist(), pc.tolist(), data.tolist(), strict=True)
    return b"".join(b"%b%08x,%d\n" % (heads[k], d if k else p, 8 if k else 4) for k, p, d in rows)


def instructions(count):
    rng = np.random.default_rng(0)
    rows = np.zeros(count, importers.CHAMPSIM_DTYPE)
    rows["ip"] = 0x400000 + 4 * (np.arange(count) % 1000)
    rows["source_memory"][:, 0] = 0x7F0000000000 + 8 * rng.integers(0, 100_000, count)
    rows["destination_memory"][:, 0] = np.where(rng.integers(0, 3, count) == 0, 0x600000 + np.arange(count) % 4096, 0)
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("import")
    (folder / "lackey").write_bytes(text())
    (folder / "champsim").write_bytes(instructions(LINES // 4).tobytes())
    return folder


def rate(benchmark, units):
    if benchmark.stats:
        benchmark.extra_info["rate"] = units / benchmark.stats.stats.median


@pytest.mark.benchmark(group="import")
def test_parse_lackey(benchmark):
    """The parser alone."""
    data = text()
    arrays = [np.empty(LINES, code) for code in ("u1", "u2", "u8")]
    result = benchmark.pedantic(lambda: lackey.parse(data, 0, len(data), *arrays, 0), rounds=6)
    assert result == (len(data), LINES, lackey.MORE)
    rate(benchmark, LINES)


@pytest.mark.benchmark(group="import")
@pytest.mark.parametrize("form", ["lackey", "champsim"])
def test_import(benchmark, files, form):
    """From a file to a recording, compressed. Units are lines, and instructions."""
    out = files / f"{form}.screc"
    writer = benchmark.pedantic(lambda: importers.convert([files / form], out, form), rounds=3)
    assert writer.complete
    assert writer.records >= LINES if form == "lackey" else LINES // 2
    rate(benchmark, LINES if form == "lackey" else LINES // 4)


@pytest.mark.benchmark(group="recording")
@pytest.mark.parametrize("what", ["write", "read", "operations"])
def test_recording(benchmark, files, what):
    """Records of a recording made from lackey's text, or of operations with the same addresses."""
    importers.convert([files / "lackey"], files / "program.screc", "lackey")
    with Reader(files / "program.screc") as reader:
        columns = [block.columns for block in reader]
    with Writer(files / "ops.screc", OPERATIONS) as writer:
        for some in columns:
            writer.write(op=np.minimum(some["op"], 2), user=1, size=8, addr=some["addr"])

    def write():
        with Writer(files / "again.screc", PROGRAM) as writer:
            for some in columns:
                writer.write(**some)
        return writer.records

    def read():
        with Reader(files / "program.screc", ahead=0) as reader:
            return sum(block.records for block in reader)

    def operations():
        with Reader(files / "ops.screc", ahead=0) as reader:
            return sum(len(ops) for ops in reader.operations())

    function = {"write": write, "read": read, "operations": operations}[what]
    assert benchmark.pedantic(function, rounds=6) == LINES
    rate(benchmark, LINES)


def best(function, rounds=4):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def replay(path, ahead):
    """A recording of operations, run: seconds, and seconds that the engine took of them."""
    engine = 0.0
    start = time.perf_counter()
    with Reader(path, ahead=ahead) as reader:
        cpu = sc.trace.machine(reader).vcpus[0]
        for ops in reader.operations():
            clock = time.perf_counter()
            cpu.run(ops, data=False)
            engine += time.perf_counter() - clock
    return time.perf_counter() - start, engine


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if len(sys.argv) > 1:
            log = Path(sys.argv[1])
        else:
            (folder / "lackey").write_bytes(text())
            log = folder / "lackey"
        data = log.read_bytes()
        seconds, writer = best(lambda: importers.convert([log], folder / "out.screc", "lackey"))
        size = (folder / "out.screc").stat().st_size
        print(f"lackey: {writer.records:,} accesses, {writer.records / seconds / 1e6:.1f} M lines/s to a recording of")
        print(f"        {size / writer.records:.2f} bytes each, of {len(data) / writer.records:.1f} as text", end="")
        print(
            f" ({len(lzma.compress(data[: 1 << 24])) / min(len(data), 1 << 24) * len(data) / writer.records:.2f} as xz)"
        )
        (folder / "champsim").write_bytes(instructions(1_000_000).tobytes())
        seconds, writer = best(lambda: importers.convert([folder / "champsim"], folder / "c.screc", "champsim"))
        print(f"ChampSim: {1 / seconds:.1f} M instructions/s, {writer.records / seconds / 1e6:.1f} M accesses/s")
        with Reader(folder / "out.screc") as reader:
            columns = [block.columns for block in reader]
        vm = sc.VM(memory="16MiB", mmu="cached")
        tables = sc.PageTables(vm.memory, mode="64", allocate=range(3000, 4096))
        tables.map(0x400000, 0, 1024 * 4096, "rwu")
        for register, value in tables.registers.items():
            setattr(vm.vcpus[0], register, value)
        with Writer(folder / "ops.screc", OPERATIONS, vm=vm) as writer:
            for some in columns:
                # The same pattern, within pages that are mapped.
                addr = 0x400000 + (some["addr"] & np.uint64((1 << 22) - 8))
                writer.write(op=np.minimum(some["op"], 1), user=1, size=8, addr=addr)
        for ahead in (0, 1, 2):
            times = [replay(folder / "ops.screc", ahead) for _ in range(3)]
            whole, engine = (1e9 * min(column) / writer.records for column in zip(*times, strict=True))
            print(f"operations, {ahead} blocks ahead: {whole:.1f} ns each, the engine alone {engine:.1f}")


if __name__ == "__main__":
    main()
