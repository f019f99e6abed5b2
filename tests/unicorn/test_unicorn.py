"""Guests in Unicorn on our MMU: what they compute, and that the MMU counts what it counts without Unicorn."""

import importlib.util
import shutil
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from places import ROOT

import shadowcore as sc

pytest.importorskip("unicorn", minversion="2.1", reason="the extra 'unicorn' is not installed")
from shadowcore import unicorn as su
from shadowcore.unicorn import cpu as unicorn_cpu

EXAMPLES = ROOT / "examples" / "unicorn"
if not EXAMPLES.is_dir():
    pytest.skip("examples/ is not beside tests/", allow_module_level=True)
spec = importlib.util.spec_from_file_location("unicorn_guest", EXAMPLES / "guest.py")
guest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(guest)

FEATURES = sc.Features(maxphyaddr=40, pku=False, pcid=False)
DESIGNS = ("native", "flush", "cached", "kvm-2007", "unsync")
# Stores that Unicorn makes by itself to a leaf table out of sync are in no recording.
UNSEEN = ("unsync", "walker")
# What differs between the ways, for one counts the accesses that succeed as well.
OF_SUCCESS = {"accesses", "walk_references", "gp_guest"}


def fresh(mmu):
    return sc.VM("64MiB", mmu, features=FEATURES)


def counters(vm):
    return dict(vm.stats.as_dict())


def bare(code, mmu="cached", way="walker", **settings):
    """A machine that is about to run `code`, in 32-bit protected mode with paging off."""
    vm = fresh(mmu)
    vm.write_physical(0x1000, code)
    machine = su.Machine(vm, way, **settings)
    machine.start(0x1000, rsp=0x8000)
    return machine


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_kernel_computes_what_the_model_does_and_counts_what_the_engine_does(mmu, way):
    machine = su.boot(EXAMPLES / "kernel.elf", mmu=mmu, way=way, record=True)
    assert machine.run(seconds=60) == 0
    assert machine.serial.decode().strip() == guest.guest_model()
    assert machine.vm.audit(strict=True).ok
    if (mmu, way) == UNSEEN:
        return
    other = fresh(mmu)
    machine.recording.replay(other)
    assert counters(other) == counters(machine.vm)
    assert other.vcpus[0].cr3 == machine.cpu.cr3
    assert other.audit(strict=True).ok
    if mmu != "native":
        assert np.array_equal(other.mmu.pages, machine.vm.mmu.pages)


@pytest.mark.parametrize("mmu", DESIGNS)
def test_both_ways_take_the_same_exits(mmu):
    found = []
    for way in su.WAYS:
        machine = su.boot(EXAMPLES / "kernel.elf", mmu=mmu, way=way)
        machine.run(seconds=60)
        found.append({name: value for name, value in counters(machine.vm).items() if name not in OF_SUCCESS})
    assert found[0] == found[1]
    assert found[0]["pf_guest"] == 142


@pytest.mark.parametrize("image", ["kernel.elf", "corners.elf"])
@pytest.mark.parametrize("mmu", ["native", "flush", "cached", "unsync"])
def test_fills_without_python_are_those_by_python(mmu, image, monkeypatch):
    """Served by the function in C; by Python, since all is recorded; by Python, since Unicorn hides its library."""
    found, asked = [], []
    for record, hidden in ((False, False), (True, False), (False, True)):
        if hidden:
            monkeypatch.setattr(unicorn_cpu.Processor, "function", staticmethod(lambda name: None))
        machine = su.boot(EXAMPLES / image, mmu=mmu, way="fills", record=record)
        filled, count = machine._filled, []
        monkeypatch.setattr(machine, "_filled", lambda *miss, to=filled, count=count: count.append(miss) or to(*miss))
        assert machine.run(seconds=60) == 0
        assert machine.vm.audit(strict=True).ok
        found.append((counters(machine.vm), bytes(machine.serial), machine.exits))
        asked.append(len(count))
    assert found[0] == found[1] == found[2]
    assert asked[0] < asked[1] == asked[2]


@pytest.mark.parametrize("mmu", ["native", "flush", "cached", "unsync"])
def test_what_an_access_serves_does_not_come_to_python(mmu, monkeypatch):
    """Of all misses, those that come to Python with nothing else under way and are filled there are under 5 %."""
    misses, in_python = [], []
    for record, into in ((True, misses), (False, in_python)):
        machine = su.boot(EXAMPLES / "kernel.elf", mmu=mmu, way="fills", record=record)

        def filled(page, access, machine=machine, fill=machine._filled, into=into, record=record):
            alone = record or machine._is_alone()
            found = fill(page, access)
            if record or (alone and found is not None):
                into.append(page)
            return found

        monkeypatch.setattr(machine, "_filled", filled)
        assert machine.run(seconds=60) == 0
    assert len(misses) > 3000
    assert len(in_python) < 0.05 * len(misses)


@pytest.mark.parametrize("at", [1, 60, 96])
def test_what_is_raised_where_a_miss_comes_to_python_ends_the_run(at, monkeypatch):
    """As by a signal's handler, which runs before the first line of the method; the guest can go on."""
    fill, misses = su.Machine._fill, []

    def interrupted(*miss):
        misses.append(miss)
        if len(misses) == at:
            raise KeyboardInterrupt
        return fill(*miss)

    monkeypatch.setattr(su.Machine, "_fill", interrupted)
    machine = su.boot(EXAMPLES / "kernel.elf", mmu="cached", way="fills")
    with pytest.raises(KeyboardInterrupt):
        machine.run(seconds=60)
    assert machine.run(seconds=60) == 0
    assert machine.serial.decode().strip() == guest.guest_model()
    assert machine.vm.audit(strict=True).ok


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("pages", [12, 40])
def test_small_pools_change_nothing_for_the_guest(way, pages):
    mmu = sc.Shadow.cached(pool_pages=pages, refill=8)
    machine = su.boot(EXAMPLES / "kernel.elf", mmu=mmu, way=way, record=True)
    assert machine.run(seconds=60) == 0
    assert machine.serial.decode().strip() == guest.guest_model()
    other = fresh(mmu)
    machine.recording.replay(other)
    assert counters(other) == counters(machine.vm)


def test_a_pool_too_small_for_one_instruction_is_an_error():
    machine = su.boot(EXAMPLES / "kernel.elf", mmu=sc.Shadow.cached(pool_pages=8, refill=6))
    with pytest.raises(sc.EngineError, match="does not complete"):
        machine.run(seconds=60)


# T is the page at 0x12000. Its last store comes when a shadow of it was made by a load in between, without an exit.
SHADOWED_LATE = (
    "b800000100 0f22d8",  # CR3 = 0x10000
    "0f20c0 0d00000080 0f22c0",  # CR0.PG = 1
    "c70500200100 03000200 c70504200100 03100200",  # T[0] = 0x20003; T[1] = 0x21003
    "c70504000100 03200100",  # T serves addresses from 0x400000 on
    "c705f02f0100 00000000",  # T[0x3fc] = 0
    "8b1d00004000 8b0d00104000",  # load 0x400000, 0x401000
    "c70504200100 03200200",  # T[1] = 0x22003
    "0f013d00104000 a100104000",  # INVLPG 0x401000; load it
    "e7f4",  # EAX to port 0xf4
)


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_a_store_to_a_table_whose_shadow_was_just_made(mmu, way):
    machine = bare(bytes.fromhex(" ".join(SHADOWED_LATE)), mmu, way)
    identity = np.arange(1024, dtype="<u4") * 4096 + 3
    machine.vm.write_physical(0x10000, np.array([0x11003], dtype="<u4").tobytes())
    machine.vm.write_physical(0x11000, identity.tobytes())
    for page in (0x20000, 0x21000, 0x22000):
        machine.vm.write_physical(page, page.to_bytes(4, "little"))
    assert machine.run(seconds=10) == 0x22000
    assert machine.vm.audit(strict=True).ok


@pytest.mark.parametrize(
    ("kind", "word", "expected"), [(0, 0, 0x22000), (1, 0, 0x22000), (2, 0, 0x22000), (3, 0, 0x22000)]
)
@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_invpcid(mmu, way, kind, word, expected):
    """Unicorn's processor has none; here it does what INVLPG does in the program above."""
    invlpg = "0f013d00104000"
    load = f"b9{kind:02x}000000 660f38820d00000300"  # MOV ECX, kind; INVPCID ECX, [0x30000]
    machine = bare(bytes.fromhex(" ".join(SHADOWED_LATE).replace(invlpg, load)), mmu, way)
    identity = np.arange(1024, dtype="<u4") * 4096 + 3
    machine.vm.write_physical(0x10000, np.array([0x11003], dtype="<u4").tobytes())
    machine.vm.write_physical(0x11000, identity.tobytes())
    machine.vm.write_physical(0x30000, np.array([word, 0x40_1000], dtype="<u8").tobytes())
    for page in (0x20000, 0x21000, 0x22000):
        machine.vm.write_physical(page, page.to_bytes(4, "little"))
    assert machine.run(seconds=10) == expected
    assert (machine.exits["invpcid"], machine.vm.stats.invpcid) == (1, 1)
    assert machine.vm.audit(strict=True).ok


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", ["native", "flush", "cached", "unsync"])
def test_odd_stores_to_tables_write_protection_off_and_the_apic(mmu, way):
    machine = su.boot(EXAMPLES / "corners.elf", mmu=mmu, way=way, record=True)
    assert machine.run(seconds=60) == 0
    assert machine.vm.audit(strict=True).ok
    if (mmu, way) == UNSEEN:
        return
    other = fresh(mmu)
    machine.recording.replay(other)
    assert counters(other) == counters(machine.vm)


def test_committed_guests_are_what_their_sources_give():
    missing = [tool for tool in guest.TOOLS if shutil.which(tool) is None]
    if missing or sys.platform != "linux":
        pytest.skip(f"GNU binutils for x86 are needed: {missing}")
    if "x86" not in subprocess.run(["as", "--version"], capture_output=True, text=True).stdout:
        pytest.skip("the assembler here is not for x86")
    for name in guest.GUESTS:
        assert guest.check(name)


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_nothing_comes_after_the_exit_port(mmu, way):
    machine = bare(bytes.fromhex("b003 e6f4 0f0b"), mmu, way)  # mov $3, %al; out %al, $0xf4; ud2, without an IDT
    assert machine.run(seconds=10) == 3
    assert machine.run(seconds=10) == 3


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_triple_fault_is_an_error_that_tells_the_story(mmu, way):
    machine = bare(b"\x0f\x0b", mmu, way)  # ud2, without an IDT
    with pytest.raises(su.TripleFault, match=r"RIP 0x1000: vector 6.*; then vector 13.*; then vector 8"):
        machine.run(seconds=10)


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_devices_are_asked_and_their_errors_come_out(mmu, way):
    asked = []

    def device(gpa, size, value):
        asked.append((gpa, size, value))
        if value == 0x55:
            raise ZeroDivisionError
        return 0xABCD

    # mov eax, [0x80000010]; mov [0x80000020], ax; mov byte ptr [0x80000030], 0x55; hlt
    code = bytes.fromhex("a110000080 66a320000080 c6053000008055 f4")
    machine = bare(code, mmu, way, devices=device)
    with pytest.raises(ZeroDivisionError):
        machine.run(seconds=10)
    assert asked == [(0x80000010, 4, None), (0x80000020, 2, 0xABCD), (0x80000030, 1, 0x55)]


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS)
@pytest.mark.parametrize("mode", ["32", "pae", "64", "la57"])
def test_every_paging_mode(mode, mmu, way):
    vm = fresh(mmu)
    tables = sc.PageTables(vm.memory, mode=mode, allocate=range(256, 512))
    tables.map(0, 0, 0x10000, "rwx")
    tables.map(0x400000, 0x20000, 0x1000, "rwx")
    code = b""
    for register, load in (("cr4", "0f22e0"), ("cr3", "0f22d8"), ("efer", "b9800000c0 31d2 0f30"), ("cr0", "0f22c0")):
        code += b"\xb8" + tables.registers[register].to_bytes(4, "little") + bytes.fromhex(load)
    # mov eax, [0x400010]; mov dword ptr [0x400010], 0x77; mov al, [0x400010]; out 0xf4, al; mov eax, cr4; hlt
    code += bytes.fromhex("a110004000 c7051000400077000000 a010004000 e6f4 0f20e0 f4")
    vm.write_physical(0x1000, code)
    machine = su.Machine(vm, way, record=True)
    machine.start(0x1000, rsp=0x8000)
    assert machine.run(seconds=10) == 0x77
    assert machine.cpu.mode == mode
    assert vm.read_physical(0x20010, 1) == b"\x77"
    assert vm.audit(strict=True).ok
    other = fresh(mmu)
    machine.recording.replay(other)
    assert counters(other) == counters(vm)


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS[:3])
@pytest.mark.parametrize(("mode", "low"), [("32", 0xFFF), ("pae", 0x1F), ("64", 0xFFF)])
def test_bits_that_processors_ignore(mode, low, mmu, way):
    """A guest sets ignored bits of CR3 and reserved bits of CR0: it goes on, and reads back those of CR3 alone."""
    vm = fresh(mmu)
    tables = sc.PageTables(vm.memory, mode=mode, allocate=range(256, 512))
    tables.map(0, 0, 0x10000, "rwx")
    code = b""
    registers = tables.registers | {"cr3": tables.cr3 | low, "cr0": tables.registers["cr0"] & ~0x10 | 0x1FFAFFC0}
    for register, load in (("cr4", "0f22e0"), ("cr3", "0f22d8"), ("efer", "b9800000c0 31d2 0f30"), ("cr0", "0f22c0")):
        code += b"\xb8" + registers[register].to_bytes(4, "little") + bytes.fromhex(load)
    # mov eax, cr3; mov cr3, eax; mov [0x2000], eax; mov eax, cr0; mov [0x2004], eax; mov al, 0x77; out 0xf4, al; hlt
    code += bytes.fromhex("0f20d8 0f22d8 a300200000 0f20c0 a304200000 b077 e6f4 f4")
    vm.write_physical(0x1000, code)
    machine = su.Machine(vm, way, record=True)
    machine.start(0x1000, rsp=0x8000)
    assert machine.run(seconds=10) == 0x77
    assert machine.cpu.mode == mode
    assert int.from_bytes(vm.read_physical(0x2000, 4), "little") == tables.cr3 | low
    assert int.from_bytes(vm.read_physical(0x2004, 4), "little") == tables.registers["cr0"]
    assert vm.audit(strict=True).ok
    other = fresh(mmu)
    machine.recording.replay(other)
    assert counters(other) == counters(vm)


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_smap_follows_the_flag(mmu, way):
    vm = fresh(mmu)
    tables = sc.PageTables(vm.memory, mode="32", allocate=range(256, 512))
    tables.map(0, 0, 0x10000, "rwx")
    tables.map(0x400000, 0x20000, 0x1000, "rwxu")
    code = b""
    for register, load, more in (("cr4", "0f22e0", 1 << 21), ("cr3", "0f22d8", 0), ("cr0", "0f22c0", 0)):
        code += b"\xb8" + (tables.registers[register] | more).to_bytes(4, "little") + bytes.fromhex(load)
    # stac; mov eax, [0x400000]; inc dword ptr [0x400000]; clac; mov eax, [0x400004]
    code += bytes.fromhex("0f01cb a100004000 ff0500004000 0f01ca a104004000")
    vm.write_physical(0x1000, code)
    machine = su.Machine(vm, way, record=True)
    machine.start(0x1000, rsp=0x8000)
    with pytest.raises(su.TripleFault, match="vector 14, error code 0x1, CR2 0x400004"):
        machine.run(seconds=10)
    assert vm.read_physical(0x20000, 1) == b"\1"
    other = fresh(mmu)
    machine.recording.replay(other)
    assert counters(other) == counters(vm)


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS[:3])
def test_a_page_fault_drops_what_unicorn_holds_of_the_page(mmu, way):
    """An entry is edited without INVLPG; a store to the page faults; the load after it reads the new frame (SDM
    4.10.4.1)."""
    vm = fresh(mmu)
    tables = sc.PageTables(vm.memory, mode="32", allocate=range(256, 512))
    tables.map(0, 0, 0x10000, "rwx")
    tables.map(0x400000, 0x20000, 0x1000, "rwx")
    entry = tables.entry(0x400000).gpa
    tables.map(0x800000, entry & ~0xFFF, 0x1000, "rwx")
    gate = struct.pack("<HHHH", 0x2000, 8, 0x8E00, 0)
    for gpa, data in (
        (0x3000, struct.pack("<HI10xHI", 23, 0x3100, 15 * 8 - 1, 0x3200)),
        (0x3100, bytes(8) + bytes.fromhex("ffff0000009acf00 ffff00000092cf00")),
        (0x3200 + 14 * 8, gate),
        (0x20000, b"\x11"),
        (0x21000, b"\x22"),
        (0x2000, bytes.fromhex("83c404 c7042400180000 cf")),  # add esp, 4; mov dword ptr [esp], 0x1800; iret
        (0x1800, bytes.fromhex("a000004000 e6f4 f4")),  # mov al, [0x400000]; out 0xf4, al; hlt
    ):
        vm.write_physical(gpa, data)
    code = bytes.fromhex("0f011500300000 0f011d10300000")  # lgdt [0x3000]; lidt [0x3010]
    for register, load, more in (("cr4", "0f22e0", 0), ("cr3", "0f22d8", 0), ("cr0", "0f22c0", 1 << 16)):
        code += b"\xb8" + (tables.registers[register] | more).to_bytes(4, "little") + bytes.fromhex(load)
    # mov al, [0x400000]; mov dword ptr [entry], 0x21021; mov dword ptr [0x400004], 1
    edit = b"\xc7\x05" + struct.pack("<II", 0x800000 + (entry & 0xFFF), 0x21021)
    vm.write_physical(0x1000, code + bytes.fromhex("a000004000") + edit + bytes.fromhex("c7050400400001000000"))
    machine = su.Machine(vm, way)
    machine.start(0x1000, rsp=0x8000)
    assert machine.run(seconds=10) == 0x22
    assert vm.stats.pf_guest == 1


@pytest.mark.parametrize("way", su.WAYS)
def test_halt_time_limit_and_exit_code(way):
    machine = bare(b"\xf4", way=way)
    assert machine.run(seconds=10) is None
    assert machine.halted
    machine = bare(b"\xeb\xfe", way=way)  # for ever
    assert machine.run(seconds=0.2) is None
    assert not machine.halted
    assert bare(bytes.fromhex("b02a e6f4 f4"), way=way).run(seconds=10) == 42


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_where_no_memory_is_loads_give_ones(mmu, way):
    machine = bare(bytes.fromhex("a110000080 a220000080 e6f4 f4"), mmu, way)
    assert machine.run(seconds=10) == 0xFF


def test_real_mode_is_refused():
    machine = bare(bytes.fromhex("0f20c0 24fe 0f22c0 f4"))  # clears CR0.PE
    with pytest.raises(su.Unsupported, match="real mode"):
        machine.run(seconds=10)


@pytest.mark.parametrize("image", [b"", b"\x7fELF" + bytes(100), b"\x7fELF" + bytes(60) + b"\x02\xb0\xad\x1b"])
def test_what_is_no_image_is_refused(tmp_path, image):
    path = tmp_path / "image"
    path.write_bytes(image)
    with pytest.raises(sc.ConfigError, match="boot"):
        su.boot(path)


def test_image_larger_than_memory_is_refused():
    with pytest.raises(sc.ConfigError):
        su.boot(EXAMPLES / "kernel.elf", memory="1MiB")


def test_way_is_checked():
    with pytest.raises(sc.ConfigError, match="way"):
        su.Machine(fresh("cached"), "both")


def test_memory_is_shared_not_copied():
    ram = np.zeros(1 << 24, dtype=np.uint8)
    vm = sc.VM(ram, "cached", features=FEATURES)
    ram[0x1000:0x1007] = np.frombuffer(bytes.fromhex("c6050020000077"), dtype=np.uint8)
    ram[0x1007] = 0xF4
    machine = su.Machine(vm)
    machine.start(0x1000)
    machine.run(seconds=10)
    assert ram[0x2000] == 0x77


def test_without_unicorn_the_error_says_how_to_install_it():
    code = """
        import sys
        sys.modules["unicorn"] = None
        try:
            import shadowcore.unicorn
        except ImportError as error:
            print(error)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert 'pip install "shadowcore[unicorn]"' in out.stdout


def test_the_example_runs():
    out = subprocess.run([sys.executable, EXAMPLES / "guest.py"], capture_output=True, text=True, check=True)
    assert out.stdout.count(guest.guest_model()) == 8


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", ["flush", "cached", "unsync"])
def test_stores_after_a_dirty_log_was_cleared_between_runs(mmu, way):
    """Clearing it asks for a flush, and Unicorn's own translations of before would let the next stores pass unseen."""
    store = bytes.fromhex("c60500300000")  # mov byte [0x3000], ...
    out = bytes.fromhex("e6f4eb00")  # OUT ends the run with its block of code, which ends at the jump
    machine = bare(store + b"\1" + out + store + b"\2" + out + store + b"\3" + out, mmu, way)
    memory = machine.vm.memory
    memory.start_dirty_log()
    for number in (1, 2, 3):
        machine.exit_code = None
        machine.run(seconds=30)
        assert memory.bytes[0x3000] == number
        # `unsync` gives W, and logs that, where the guest may store, also if it loads or fetches.
        assert set(np.flatnonzero(memory.dirty_log())) - ({1} if mmu == "unsync" else set()) == {3}
        memory.clear_dirty_log()


def test_recording_of_an_address_that_is_not_canonical():
    """No table is read for it."""
    machine = bare(b"\x90", record=True)
    machine.vm.vcpus[0].run(np.zeros(0, sc.OP_DTYPE))
    tables = sc.PageTables(machine.vm.memory, "64", allocate=range(2048, 2100))
    tables.map(0x400000, 0x200000, 4096, "rwx")
    for name, value in tables.registers.items():
        setattr(machine.cpu, name, value)
    assert machine._op(sc.Op.READ, 1 << 60).outcome.tolist() == [2]
    assert machine._op(sc.Op.READ, 0x400000).outcome.tolist() == [0]


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_memory_slots_change_between_runs(mmu, way):
    """What Unicorn remembers of a slot goes with it; a store to a read-only one does not reach its frames."""
    place, size = 32 << 20, 1 << 20
    vm = sc.VM("64MiB", mmu, features=FEATURES, slots=[sc.MemorySlot(0, place)])
    vm.write_physical(0x1000, b"\xa1" + struct.pack("<I", place) + b"\xe6\xf4")  # mov eax, [place]; out 0xf4, al
    vm.write_physical(0x2000, b"\xb0\x63\xa2" + struct.pack("<I", place) + b"\xe6\xf4")  # mov [place], al
    machine = su.Machine(vm, way)
    vm.memory.bytes[[place, place + size]] = 7, 9

    def run(start=0x1000):
        machine.exit_code = None
        machine.start(start, rsp=0x8000)
        return machine.run(seconds=20)

    for frames, value in ((0, 7), (size, 9), (0, 7)):
        number = vm.add_slot(place, size, offset=place + frames)
        assert run() == run() == value
        assert run(0x2000) == 0x63
        assert vm.memory.bytes[place + frames] == 0x63
        vm.memory.bytes[place + frames] = value
        vm.remove_slot(number)
    vm.add_slot(place, size, offset=place, read_only=True)
    assert run() == 7
    run(0x2000)
    assert vm.memory.bytes[place] == 7
    vm.host_unmap(place >> 12, 1)
    assert run() == 7
    assert vm.stats.host_faults > 0 or (mmu, way) == ("native", "walker")
    assert vm.audit().ok
