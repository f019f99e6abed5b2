"""Each invariant broken by hand (`broken_entries`, `broken_pool`), and an audit that sees just that."""

import broken
import broken_entries
import broken_pool
import broken_unsync
import pytest
from broken import (
    HOST_ABSENT,
    HOST_READ_ONLY,
    LEAF,
    LEVEL,
    NONGLOBAL,
    ROOT,
    TLB_LOG,
    TLB_SHADOW,
    TLB_STALE,
    TLB_TABLE,
    found,
    machine,
)

from shadowcore.engine.invariants import SENTENCES

CASES = broken_entries.CASES + broken_pool.CASES


@pytest.mark.parametrize(("break_it", "sentence", "mode"), CASES)
def test_broken(break_it, sentence, mode):
    guest = machine(mode)
    expected = break_it(guest)
    assert sentence in [what for _, what, *_ in expected]
    assert len({invariant for invariant, *_ in expected}) == 1
    assert sorted(found(guest.vm), key=repr) == sorted(expected, key=repr)


BOOKS = "the policy's queues do not hold the pages in use, or do not end"  # tests/engine/test_policies.py


def test_each_sentence_has_a_case():
    by_hand = {case.values[1] for case in CASES} | {NONGLOBAL, TLB_STALE, TLB_TABLE, TLB_LOG, TLB_SHADOW}
    by_hand |= {LEAF, LEVEL, ROOT, broken.MARKER, HOST_ABSENT, HOST_READ_ONLY} | broken_unsync.SENTENCES
    by_hand |= {BOOKS}
    assert by_hand == set(SENTENCES)
