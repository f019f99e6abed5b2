"""The ways of 2.6.28: tables out of sync in one role alone, in sync again when looked up, INVLPG that makes nothing."""

import pytest
from guest2007 import DATA, PAGE, USER, Guest, every_mode

import shadowcore as sc

SETTINGS = {"prefetch": 0, "prev_roots": 0}
HALF = USER + (2 << 20)
"""A page of the other half of the same 32-bit table."""


def guest(mode, release, **more):
    """One that has used its first user page, and of the window on its tables nothing: a leaf that maps a table, and has
    W, makes it unsync."""
    made = Guest(mode, sc.Shadow.unsync(release=release, **SETTINGS), **more)
    made.map(HALF, DATA + 16 * PAGE)
    made.cpu.read(USER, 4, user=True)
    return made


def unsync(made):
    return int(made.pages(made.table(USER))["unsync"].sum())


@every_mode
@pytest.mark.parametrize("release", ["2.6.28", "6.1"])
def test_a_table_in_one_role_runs_out_of_sync(mode, release):
    made = guest(mode, release)
    with made.counting("unsync_made") as moved:
        made.edit(USER + PAGE, 0)
        made.edit(USER + 2 * PAGE, 0)
    assert (moved["pf_taken"], moved["unsync_made"], moved.get("pf_emulate", 0)) == (1, 1, 0)
    assert made.clean()


@pytest.mark.parametrize(("release", "lags"), [("2.6.28", 0), ("6.1", 2)])
def test_one_in_two_roles_does_not(release, lags):
    """A 32-bit table has a shadow page for each half."""
    made = guest("32", release)
    made.cpu.read(HALF, 4, user=True)
    with made.counting("unsync_made") as moved:
        for page in range(1, 4):
            made.edit(USER + page * PAGE, 0)
    assert moved.get("unsync_made", 0) == unsync(made) == lags
    assert moved.get("pf_emulate", 0) == (0 if lags else 3)
    if not lags:  # the table is in sync: what the stores took away is gone at once
        with pytest.raises(sc.PageFault):
            made.cpu.read(USER + PAGE, 4, user=True)
    assert made.clean()


@pytest.mark.parametrize(("release", "lags"), [("2.6.28", 0), ("6.1", 1)])
def test_a_second_role_brings_the_first_back_in_sync(release, lags):
    made = guest("32", release)
    made.cpu.read(USER + PAGE, 4, user=True)
    made.edit(USER + PAGE, 0)
    assert unsync(made) == 1
    made.cpu.read(USER + PAGE, 4, user=True)  # the translation of before; the guest has not flushed
    with made.counting("synced") as moved:
        made.cpu.read(HALF, 4, user=True)
    assert (unsync(made), moved.get("synced", 0)) == (lags, 1 - lags)
    if not lags:
        with pytest.raises(sc.PageFault):
            made.cpu.read(USER + PAGE, 4, user=True)
    assert made.clean()


@every_mode
@pytest.mark.parametrize(("release", "exits"), [("2.6.28", 1), ("6.1", 0), ("6.12", 0)])
def test_invlpg(mode, release, exits):
    """Of a page that is not unsync 2.6.28 drops the leaf, 6.1 does nothing; of one that is, 6.1 makes it anew."""
    for lags in (False, True):
        made = guest(mode, release)
        made.cpu.read(USER, 4, user=True)
        if lags:
            made.edit(USER + 2 * PAGE, 0)
        assert unsync(made) == lags
        made.cpu.invlpg(USER)
        assert made.exits(USER) == exits
        assert made.clean()


def test_the_release_has_to_be_one():
    with pytest.raises(sc.ConfigError, match=r"release: '2\.6\.29' is not one of 6\.1, 6\.12, 2\.6\.28"):
        sc.Shadow.unsync(release="2.6.29")
