"""Debian's kernels boot under the recorder, in every mode of paging: what was recorded replays under every design
without a difference. `recorder/fetch.sh` fetches the kernels."""

import pytest
from emulated import EMULATORS, linux_command, needs

import shadowcore as sc
from shadowcore.recording import emulated

GUESTS = {
    "unpacked": ("vmlinux-amd64", "amd64", "max,la57=off", ""),
    "4-level": ("vmlinuz-amd64", "amd64", "max,la57=off", ""),
    "isolation": ("vmlinuz-amd64", "amd64", "max,la57=off", "pti=on"),
    "5-level": ("vmlinuz-amd64", "amd64", "max,la57=on", ""),
    "no-kaslr": ("vmlinuz-amd64", "amd64", "max,la57=off", "nokaslr"),
    "PAE": ("vmlinuz-686-pae", "i386", "max", ""),
    "32-bit": ("vmlinuz-686", "i386", "max", ""),
    "two-processors": ("vmlinuz-amd64", "amd64", "max,la57=off", "", "-smp", "2"),
    "two-PAE": ("vmlinuz-686-pae", "i386", "max", "", "-smp", "2"),
    "two-5-level-isolation": ("vmlinuz-amd64", "amd64", "max,la57=on", "pti=on", "-smp", "2"),
}
QUICK = "unpacked"  # the one that is booted each time: to unpack itself is most of what the others do


@pytest.mark.parametrize("emulator", EMULATORS)
@pytest.mark.parametrize(
    "guest", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in GUESTS if name != QUICK)]
)
def test_linux_replays(emulator, guest, tmp_path):
    needs(emulator)
    out = tmp_path / "linux.screc"
    assert emulated.record(linux_command(emulator, tmp_path, *GUESTS[guest]), out).complete
    recording = sc.trace.open_recording(out)
    assert recording.first_user is not None
    assert recording.vcpus == (2 if "two" in guest else 1)
    for design in ("native", "flush", "cached", "unsync"):
        result = sc.trace.replay(recording, design, audit_every=100_000)
        assert (result.faults, result.gpa_mismatches, result.mismatch_records) == (0, 0, ()), design
        assert result.violations == ()
        assert result.accesses > 100_000
        assert result.table_stores > 10_000
