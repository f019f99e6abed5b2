"""Debian's kernels boot under the recorder, in every mode of paging: what was recorded replays under every design
without a difference. `recorder/fetch.sh` fetches the kernels."""

import pytest
from emulated import EMULATORS, LINUX, linux_command, needs

import shadowcore as sc
from shadowcore.recording import emulated

QUICK = "unpacked"  # the one that is booted each time: to unpack itself is most of what the others do


@pytest.mark.parametrize("emulator", EMULATORS)
@pytest.mark.parametrize(
    "guest", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LINUX if name != QUICK)]
)
def test_linux_replays(emulator, guest, tmp_path):
    needs(emulator)
    out = tmp_path / "linux.screc"
    assert emulated.record(linux_command(emulator, tmp_path, *LINUX[guest]), out).complete
    recording = sc.trace.open_recording(out)
    assert recording.first_user is not None
    assert recording.vcpus == (2 if "two" in guest else 1)
    for design in ("native", "flush", "cached", "unsync"):
        result = sc.trace.replay(recording, design, audit_every=100_000)
        assert (result.faults, result.gpa_mismatches, result.mismatch_records) == (0, 0, ()), design
        assert result.violations == ()
        assert result.accesses > 100_000
        assert result.table_stores > 10_000
