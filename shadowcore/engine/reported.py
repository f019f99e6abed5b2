"""What reports tell of designs `unsync`, `nested` and `agile` beside exits: counters, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping

UNSYNC = {
    "unsync_made": "leaf tables that went unsync",
    "synced": "leaf tables synced again",
    "prefetched": "shadow entries prefetched",
    "prev_root_hits": "CR3 loads served by a previous root",
    "pf_spurious": "page faults that were spurious",
    "npf_violation": "EPT violations (#NPF) among the exits",
    "npf_misconfig": "EPT misconfigurations (devices) among the exits",
    "pf_fast": "of these, W given back without the lock",
    "to_nested": "guest tables that came to be walked nested",
    "to_shadow": "guest tables that were shadowed again",
    "nested_walks": "walks that went on below a mark",
}
"""By counter of VM.stats, in the order of reports, which show those that are not 0 in some design."""


def unsync_counts(counters: Mapping[str, int]) -> dict[str, int]:
    """These counters, for JSON and CSV."""
    return {name.removeprefix("pf_"): counters.get(name, 0) for name in UNSYNC}
