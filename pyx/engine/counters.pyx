"""Counters by KVM's names, and how they are read from Python."""
from libc.string cimport memset

from shadowcore.engine.counters cimport EXIT_COUNT, EXIT_FAULTS, sc_stats
from shadowcore.engine.types cimport u64

EXIT_REASONS = ("fill", "write", "emulate", "guest", "mmio", "cr0", "cr3", "cr4", "efer", "invlpg")
assert len(EXIT_REASONS) == EXIT_COUNT
PF_REASONS = EXIT_REASONS[:EXIT_FAULTS]


cdef tuple _names():
    """The fields of sc_stats but for `exits`, in their order."""
    cdef sc_stats stats
    memset(&stats, 0, sizeof(stats))
    fields = <dict>stats
    return tuple([name for name in fields if name != "exits"])


COUNTERS = _names()

assert sizeof(sc_stats) == 8 * (len(EXIT_REASONS) + len(COUNTERS))

cdef dict _INDEX = {name: len(EXIT_REASONS) + i for i, name in enumerate(COUNTERS)}


# Counters that tell how much there is now, and not what happened since a moment.
GAUGES = ("mmu_unsync", "pages_4k", "pages_2m", "pages_1g")


cdef class Stats:
    """Live counters of a VM: attributes by KVM's names, `exits` by reason, `as_dict()`, `reset()`.

    Page-fault exits are the reasons "fill", "write", "emulate", "guest" and "mmio": pf_taken is their sum (design
    `unsync`: with pf_mmio_spte_hit, which KVM does not count among them). mmu_unsync, pages_4k, pages_2m and pages_1g
    are gauges: what there is now; in the stats of a run, at its end.
    """

    def __cinit__(self, owner=None):
        memset(&self.own, 0, sizeof(sc_stats))
        self.c = &self.own
        self.owner = owner

    def __getattr__(self, name):
        cdef object index = _INDEX.get(name)
        if index is None:
            raise AttributeError(f"no counter named {name!r}; counters are {', '.join(COUNTERS)}")
        return (<u64 *>self.c)[<int>index]

    def __dir__(self):
        return [*COUNTERS, "exits", "exits_total", "as_dict", "reset"]

    @property
    def exits(self) -> dict:
        """VM exits by reason."""
        cdef u64 *c = <u64 *>self.c
        return {name: c[i] for i, name in enumerate(EXIT_REASONS)}

    @property
    def exits_total(self) -> int:
        """VM exits, all reasons."""
        return sum(self.exits.values())

    def as_dict(self) -> dict:
        """All counters in one flat dict; exits as `exits_REASON`, and `exits_total`."""
        cdef u64 *c = <u64 *>self.c
        cdef dict flat = {f"exits_{name}": c[i] for i, name in enumerate(EXIT_REASONS)}
        flat["exits_total"] = sum(flat.values())
        for name, index in _INDEX.items():
            flat[name] = c[<int>index]
        return flat

    def as_array(self):
        """All counters as a uint64 array (a copy): the exits in the order of EXIT_REASONS, then COUNTERS."""
        import numpy as np
        return np.frombuffer((<char *>self.c)[:sizeof(sc_stats)], dtype="<u8").copy()

    def __reduce__(self):
        # By name: a later version may have more of them. What comes back is no VM's.
        return _pickled_stats, (self.exits, {name: (<u64 *>self.c)[<int>index] for name, index in _INDEX.items()})

    def reset(self) -> None:
        """Set every counter to zero, but for gauges: what they count is still there."""
        cdef sc_stats kept = self.c[0]
        if self.owner is not None:
            self.owner.counters_reset()
        memset(self.c, 0, sizeof(sc_stats))
        _copy_gauges(self.c, &kept)

    def _repr_html_(self):
        from shadowcore.notebook import counters
        return counters("Stats: counters that are not 0", self.as_dict())

    def __repr__(self):
        shown = {k: v for k, v in self.as_dict().items() if v}
        return f"Stats({shown})"


def _pickled_stats(dict exits, dict counters):
    """Stats that no VM is behind, with these counts; what is not named is 0."""
    cdef Stats made = Stats()
    cdef u64 *c = <u64 *>made.c
    for i, name in enumerate(EXIT_REASONS):
        c[i] = exits.get(name, 0)
    for name, index in _INDEX.items():
        c[<int>index] = counters.get(name, 0)
    return made


cdef inline void _copy_gauges(sc_stats *to, const sc_stats *source) noexcept:
    to.mmu_unsync = source.mmu_unsync
    to.pages_4k = source.pages_4k
    to.pages_2m = source.pages_2m
    to.pages_1g = source.pages_1g


cdef Stats stats_between(const sc_stats *before, const sc_stats *after):
    """What was counted from one copy of the counters to the next; gauges as they are in the latter."""
    cdef Stats difference = Stats()
    cdef int i
    for i in range(<int>(sizeof(sc_stats) // sizeof(u64))):
        (<u64 *>&difference.own)[i] = (<const u64 *>after)[i] - (<const u64 *>before)[i]
    _copy_gauges(&difference.own, after)
    return difference
