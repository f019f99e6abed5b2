"""VM.save and VM.load: the run after a load is the run without it, and no damaged file gives a machine."""

import json
import zipfile

import numpy as np
import pytest
from streams import machine, stream

import shadowcore as sc
from shadowcore.engine import snapshot

DESIGNS = ["native", "flush", "cached", "kvm-2007", "unsync", "adaptive", "kvm-6.12"]
RESULTS = ("outcome", "error_code", "gpa", "value", "exits", "emulated")


def half_way(name, design, tlb=None):
    """A VM in the middle of a recorded stream, and the operations that are left."""
    data = stream(name)
    vm = machine(data, design, tlb=tlb)
    middle = len(data["ops"]) // 2
    vm.vcpus[0].run(data["ops"][:middle])
    return vm, data["ops"][middle:]


def assert_same(one, other):
    assert one.stats.as_dict() == other.stats.as_dict()
    assert np.array_equal(one.memory.bytes, other.memory.bytes)
    assert np.array_equal(one.mmu.pages, other.mmu.pages)
    assert [cpu.export_state() for cpu in one.vcpus] == [cpu.export_state() for cpu in other.vcpus]
    assert all(np.array_equal(a.tlb, b.tlb) for a, b in zip(one.vcpus, other.vcpus, strict=True))


@pytest.mark.parametrize("tlb", [None, sc.TLB(small_entries=12, small_ways=4)], ids=["no tlb", "tlb"])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", ["fuzz_64_s6", "fuzz_pae_s6", "fuzz_32_s6", "pressure_32_s1", "modeswitch_mix_s1"])
def test_continues_bit_for_bit(tmp_path, name, design, tlb):
    vm, left = half_way(name, design, tlb)
    vm.save(tmp_path / "vm")
    loaded = sc.VM.load(tmp_path / "vm")
    assert_same(vm, loaded)
    one, other = vm.vcpus[0].run(left), loaded.vcpus[0].run(left)
    for field in RESULTS:
        assert np.array_equal(getattr(one, field), getattr(other, field)), field
    assert_same(vm, loaded)


def test_keeps_settings_slots_and_logs(tmp_path):
    slots = [sc.MemorySlot(0, "1MiB", dirty_log=True), sc.MemorySlot(8 << 20, "1MiB")]
    features = sc.Features(maxphyaddr=40, la57=False)
    design = sc.Shadow.cached(pool_pages=64, flood_threshold=None, quirks=sc.Quirk.TWO_EXITS)
    vm = sc.VM(slots, design, vcpus=2, features=features)
    vm.vcpus[1].write(0x5000, 1)
    vm.vcpus[0].write(8 << 20, 2)
    vm.save(tmp_path / "vm")
    loaded = sc.VM.load(tmp_path / "vm")
    assert (loaded.mmu.design, loaded.features, loaded.tlb) == (design, features, None)
    assert [(slot.gpa, slot.size) for slot in loaded.memory.slots] == [(0, 1 << 20), (8 << 20, 1 << 20)]
    assert np.flatnonzero(loaded.memory.dirty_log(0)).tolist() == [5]
    assert loaded.memory.logged_slots == (0,)
    assert_same(vm, loaded)
    assert loaded.vcpus[1].read(0x5000) == 1


def test_an_older_file_survives_a_failed_save(tmp_path, monkeypatch):
    vm = sc.VM("1MiB")
    vm.save(tmp_path / "vm")
    before = (tmp_path / "vm").read_bytes()

    def full(*args, **members):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        vm.save(tmp_path / "vm")
    assert (tmp_path / "vm").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["vm"]


def test_cut_short_at_every_length(tmp_path):
    vm, _ = half_way("fuzz_64_s6", "cached")
    vm.save(tmp_path / "vm")
    whole = (tmp_path / "vm").read_bytes()
    for length in (*range(0, len(whole) - 1, len(whole) // 40), len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(sc.SnapshotError):
            sc.VM.load(tmp_path / "cut")


def test_every_altered_byte_is_noticed_or_means_nothing(tmp_path):
    vm, _ = half_way("q_cr3exhaust_32_s1", "cached")
    vm.save(tmp_path / "vm")
    whole = bytearray((tmp_path / "vm").read_bytes())
    for at in range(0, len(whole), 97):
        altered = whole.copy()
        altered[at] ^= 0x41
        (tmp_path / "bad").write_bytes(altered)
        try:
            loaded = sc.VM.load(tmp_path / "bad")
        except sc.SnapshotError:
            continue
        assert_same(vm, loaded)  # a date or an attribute of the archive


def rewritten(path, change, members=None):
    """The saved file with its state and arrays changed, under a digest that is right again."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    state = json.loads(str(arrays.pop("state")))
    del arrays["digest"]
    change(state, arrays)
    text = json.dumps(state)
    np.savez(path, state=np.array(text), digest=np.array(snapshot._digest(text, arrays)), **arrays)
    return f"{path}.npz"


def set_in(array, value):
    def change(state, arrays):
        flat = arrays[array].reshape(-1)
        flat.view(np.uint32)[: min(64, flat.size // 4)] = value

    return change


CHANGES = {
    "version": lambda state, arrays: state.update(version=4),
    "an older version": lambda state, arrays: state.update(version=1),
    "a version that is no number": lambda state, arrays: state.update(version="3"),
    "format": lambda state, arrays: state.update(format="else"),
    "no registers": lambda state, arrays: state["vcpus"][0].pop("cr3"),
    "more vcpus": lambda state, arrays: state["vcpus"].append(state["vcpus"][0]),
    "roots beyond the pool": lambda state, arrays: state["vcpus"][0].update(roots=[1 << 20] * 4),
    "another memory size": lambda state, arrays: state.update(slots=[[0, 8192]]),
    "too large a memory": lambda state, arrays: state.update(slots=[[0, 1 << 51]]),
    "pool of another size": lambda state, arrays: state["design"].update(pool_pages=8),
    "quirk that does not exist": lambda state, arrays: state["design"].update(quirks=1 << 30),
    "one array less": lambda state, arrays: arrays.pop("mmu_hash"),
    "array of another type": lambda state, arrays: arrays.update(mmu_hash=arrays["mmu_hash"].astype("u2")),
    "free list elsewhere": lambda state, arrays: state["mmu"].update(free_head=77_777),
    "free list to an active page": lambda state, arrays: state["mmu"].update(free_head=state["mmu"]["young"]),
    "too many free pages": lambda state, arrays: state["mmu"].update(n_free=999),
    "hash": set_in("mmu_hash", 0x00FFFFFF),
    "headers": set_in("mmu_pages", 0x7FFFFFFF),
    "sptes": set_in("mmu_table", 0x0FFFFFFF),
    "reverse map": set_in("mmu_frames", 0x7FFFFFFF),
    "counters": lambda state, arrays: state["mmu"].update(counters=[1]),
    "a list for a state": lambda state, arrays: state.update(mmu=[]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_state_that_cannot_be(tmp_path, what):
    vm, _ = half_way("fuzz_64_s6", "cached")
    vm.save(tmp_path / "vm")
    with pytest.raises(sc.SnapshotError):
        sc.VM.load(rewritten(tmp_path / "vm", CHANGES[what]))


@pytest.mark.parametrize(
    ("version", "message"),
    [(1, "version 1, by an older shadowcore"), (4, "version 4, by a newer shadowcore"), (None, "expected, not None")],
)
def test_a_file_of_another_version(tmp_path, version, message):
    """It says whose file it is, and what knows it."""
    vm, _ = half_way("fuzz_64_s6", "cached")
    vm.save(tmp_path / "vm")
    with pytest.raises(sc.SnapshotError, match=message):
        sc.VM.load(rewritten(tmp_path / "vm", lambda state, arrays: state.update(version=version)))


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "text").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("state.npy", b"nonsense")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    for name in ("text", "zip", "arrays.npz", "missing"):
        with pytest.raises(sc.SnapshotError, match=name):
            sc.VM.load(tmp_path / name)
