"""Recorded guests under nested paging: every access reaches the gpa that the recording machine's own MMU gave, none
faults, and every audit is clean."""

import pytest
from places import LINUX_MIX

import shadowcore as sc

MIB = 1 << 20
DESIGNS = {
    "tdp": sc.Nested(),
    "direct": sc.Nested(mmu="direct"),
    "5 levels, 2 MiB": sc.Nested(levels=5, host_page_size=2 * MIB),
    "4 KiB": sc.Nested(host_page_size=4096),
}
FILES = pytest.mark.parametrize("file", [None, str(LINUX_MIX)], ids=["with isolation", "without"])


def check(file, design, audits, **options):
    recording = sc.trace.load(file)
    done = options.get("stop", recording.operations)
    result = sc.trace.replay(recording, DESIGNS[design], audit_every=done // audits, **options)
    assert (result.gpa_mismatches, result.faults, result.violations) == (0, 0, ())
    assert result.audits >= audits
    assert result.accesses > done // 2


@FILES
@pytest.mark.parametrize("design", ["tdp", "5 levels, 2 MiB"])
def test_the_first_records(file, design):
    check(file, design, 3, stop=300_000)


@pytest.mark.slow
@FILES
@pytest.mark.parametrize("design", DESIGNS)
def test_the_whole(file, design):
    check(file, design, 8)
