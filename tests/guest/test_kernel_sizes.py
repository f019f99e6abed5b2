"""The guest kernel in memories of every size: a machine that works, or GuestOutOfMemory, never anything else."""

import itertools

import pytest
from click.testing import CliRunner
from places import DATA

import shadowcore as sc
from shadowcore import Call, Prot
from shadowcore.cli import main

FAMILY = DATA / "programs" / "family.screc"
PAGE = 4096
MODES = ("32", "pae", "64", "la57")
DESIGNS = ("native", "flush", "cached", "unsync")
SIZES = sorted(
    {size for power in range(12, 27) for size in ((1 << power) - PAGE, 1 << power, (1 << power) + PAGE) if size}
)
OPTIONS = (
    {},
    {"kernel_data": 1},
    {"direct_map": "4k", "kernel_data": 1},
    {"direct_map": "huge", "kernel_data": 1},
    {"isolation": True, "kernel_data": 1},
    {"isolation": True, "pcid": True, "direct_map": "4k"},
    {"large_pages": 1, "kernel_data": 1},
    {"large_pages": 3, "direct_map": "4k"},
    {"swap_pages": 64, "kernel_data": 1},
)
AREA = 0x10000000


def options(mode, number):
    """The options of this number in a mode, or None where the mode has them not."""
    try:
        return sc.KernelOptions(mode=mode, **OPTIONS[number])
    except sc.ConfigError:
        return None


def use(kernel, size):
    """Processes that take every frame there is, and give all of them back."""
    try:
        process = kernel.spawn(kernel.program(text=2, data=2, bss=2))
        process.mmap(min(size, 1 << 20), Prot.READ | Prot.WRITE, addr=AREA)
        kernel.call(Call.TOUCH, process.number, AREA, min(size, 1 << 20) // PAGE, PAGE, flags=1)
        if kernel.options.large_pages:
            span = (4 if kernel.options.mode == "32" else 2) << 20
            at = process.mmap(span, Prot.READ | Prot.WRITE, file=kernel.file(span // PAGE, large=True))
            process.write(at, 1)
        child = process.fork()
        kernel.call(Call.TOUCH, child.number, AREA, 5000, min(size, 1 << 20), flags=1 | 4)
    except sc.GuestOutOfMemory:
        pass
    for process in kernel.processes:
        process.exit()


def works_or_is_too_small(size, mode, number, design):
    chosen = options(mode, number)
    if chosen is None:
        return
    vm = sc.VM(size, design)
    large = (4 if mode == "32" else 2) << 20
    if chosen.large_pages > size // large // 2:
        with pytest.raises(sc.ConfigError, match="large_pages"):
            sc.Kernel(vm, chosen)
        return
    try:
        kernel = sc.Kernel(vm, chosen)
    except sc.GuestOutOfMemory:
        assert size < 4 << 20
        return
    before = kernel.frames
    assert before["large"] == before["large_free"] == chosen.large_pages
    assert before["total"] == (size // large * large // PAGE if chosen.large_pages else size // PAGE) - (
        chosen.large_pages * large // PAGE
    )
    use(kernel, size)
    after = kernel.frames
    assert after["free"] + after["boot"] + after["cache"] == after["total"]
    assert after["tables"] == after["anonymous"] == after["kernel"] == kernel.swap_used == 0
    vm.audit(strict=True)


@pytest.mark.parametrize("mode", MODES)
def test_some_sizes_of_memory(mode):
    """One set of options a size, each in turn."""
    for turn, size in enumerate(SIZES):
        works_or_is_too_small(size, mode, turn % len(OPTIONS), DESIGNS[turn % 3])
    for size in ((1 << 20) - PAGE, 1 << 20, 2 << 20, (2 << 20) - PAGE, (4 << 20) - PAGE):
        works_or_is_too_small(size, mode, 1, "cached")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("design", DESIGNS)
def test_every_size_of_memory(mode, design):
    for size, number in itertools.product(SIZES, range(len(OPTIONS))):
        works_or_is_too_small(size, mode, number, design)


@pytest.mark.parametrize("memory", ["4KiB", "64KiB", "1MiB"])
@pytest.mark.parametrize("mode", ["64", "32"])
def test_the_commands_say_it_in_one_line(memory, mode):
    runner = CliRunner()
    for arguments in (
        ("compare", "pingpong", "--operations", "20000", "--set", f"memory={memory}", "--set", f"mode={mode}"),
        ("programs", str(FAMILY), "--memory", memory, "--mode", mode, *(["--fold"] if mode == "32" else [])),
    ):
        result = runner.invoke(main, arguments)
        if result.exit_code == 0:
            assert memory == "1MiB"
            continue
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("shadowcore: ")
        assert result.stderr.count("\n") == 1
        assert "memory" in result.stderr
