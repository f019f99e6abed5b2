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

cdef dict _EXITS = {f"exits_{name}": i for i, name in enumerate(EXIT_REASONS)}
cdef dict _COUNTS = {name: len(EXIT_REASONS) + i for i, name in enumerate(COUNTERS)}
cdef dict _INDEX = _EXITS | _COUNTS                        # by the names of as_dict: where in sc_stats


# Counters that tell how much there is now, and not what happened since a moment.
GAUGES = ("mmu_unsync", "pages_4k", "pages_2m", "pages_1g", "nested_tables")


cdef class Stats:
    """Live counters of a VM: attributes and items by KVM's names, `exits` by reason, `as_dict()`, `reset()`.

    `stats.exits_fill` and `stats["exits_fill"]` are one reason of `exits`. `after - before` is what was counted between
    two copies (`stats.copy()`); `vm.measure()` does both.

    Page-fault exits are the reasons "fill", "write", "emulate", "guest" and "mmio": pf_taken is their sum (design
    `unsync`: with pf_mmio_spte_hit, which KVM does not count among them). mmu_unsync, pages_4k, pages_2m, pages_1g and
    nested_tables are gauges: what there is now; in the stats of a run, at its end.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> before = vm.stats.copy()
    >>> cpu.write(0x401000, 7)
    >>> made = vm.stats - before
    >>> made.exits_fill, made["mmu_cache_miss"]
    (1, 3)
    """

    def __cinit__(self, owner=None):
        memset(&self.own, 0, sizeof(sc_stats))
        self.c = &self.own
        self.owner = owner

    def __getattr__(self, name):
        cdef object index = _INDEX.get(name)
        if index is None:
            raise AttributeError(_unknown(name))
        return (<u64 *>self.c)[<int>index]

    def __getitem__(self, name):
        cdef object index = _INDEX.get(name) if isinstance(name, str) else None
        if index is not None:
            return (<u64 *>self.c)[<int>index]
        if name == "exits_total":
            return self.exits_total
        raise KeyError(_unknown(name))

    def __dir__(self):
        return [*_INDEX, "exits", "exits_total", "as_array", "as_dict", "copy", "reset"]

    def __sub__(self, other):
        if not isinstance(self, Stats) or not isinstance(other, Stats):
            return NotImplemented
        return stats_between((<Stats>other).c, (<Stats>self).c)

    def copy(self) -> Stats:
        """The counters as they are now: they count no further."""
        cdef Stats made = Stats()
        made.own = self.c[0]
        return made

    def _become(self, Stats other) -> None:
        """Take the counts of another. For one that no VM is behind: `VM.measure`."""
        self.own = other.c[0]

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
        cdef dict flat = {name: c[<int>index] for name, index in _EXITS.items()}
        flat["exits_total"] = sum(flat.values())
        for name, index in _COUNTS.items():
            flat[name] = c[<int>index]
        return flat

    def as_array(self):
        """All counters as a uint64 array (a copy): the exits in the order of EXIT_REASONS, then COUNTERS."""
        import numpy as np
        return np.frombuffer((<char *>self.c)[:sizeof(sc_stats)], dtype="<u8").copy()

    def __reduce__(self):
        # By name: a later version may have more of them. What comes back is no VM's.
        return _pickled_stats, (self.exits, {name: (<u64 *>self.c)[<int>index] for name, index in _COUNTS.items()})

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


def _unknown(name) -> str:
    """What to say of a counter that there is not, with the nearest that there is."""
    import difflib
    near = difflib.get_close_matches(str(name), _INDEX, 1)
    said = f"did you mean {near[0]!r}?" if near else f"counters are {', '.join(_INDEX)}"
    return f"no counter named {name!r}; {said}"


def _pickled_stats(dict exits, dict counters):
    """Stats that no VM is behind, with these counts; what is not named is 0."""
    cdef Stats made = Stats()
    cdef u64 *c = <u64 *>made.c
    for i, name in enumerate(EXIT_REASONS):
        c[i] = exits.get(name, 0)
    for name, index in _COUNTS.items():
        c[<int>index] = counters.get(name, 0)
    return made


cdef inline void _copy_gauges(sc_stats *to, const sc_stats *source) noexcept:
    to.mmu_unsync = source.mmu_unsync
    to.pages_4k = source.pages_4k
    to.pages_2m = source.pages_2m
    to.pages_1g = source.pages_1g
    to.nested_tables = source.nested_tables


cdef Stats stats_between(const sc_stats *before, const sc_stats *after):
    """What was counted from one copy of the counters to the next; gauges as they are in the latter."""
    cdef Stats difference = Stats()
    cdef int i
    for i in range(<int>(sizeof(sc_stats) // sizeof(u64))):
        (<u64 *>&difference.own)[i] = (<const u64 *>after)[i] - (<const u64 *>before)[i]
    _copy_gauges(&difference.own, after)
    return difference
