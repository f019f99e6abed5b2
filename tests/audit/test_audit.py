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


AGILE = {  # tests/agile/test_audit_agile.py
    "a guest table that the processor walks itself has a shadow, or the page that stands for it is not empty",
    "an entry of the host's tables leads to no table of theirs, or to one for other addresses",
    "the number of pages that stand for guest tables is not what the counter says",
}
BOOKS = "the policy's queues do not hold the pages in use, or do not end"  # tests/engine/test_policies.py


def test_each_sentence_has_a_case():
    by_hand = {case.values[1] for case in CASES} | {NONGLOBAL, TLB_STALE, TLB_TABLE, TLB_LOG, TLB_SHADOW}
    by_hand |= {LEAF, LEVEL, ROOT, broken.MARKER, HOST_ABSENT, HOST_READ_ONLY} | broken_unsync.SENTENCES
    by_hand |= {BOOKS} | AGILE
    assert by_hand == set(SENTENCES)
