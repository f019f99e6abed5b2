"""Audits: the checkers of `invariants` run on demand, or at named points of what the engine does.

A point is where KVM's MMU_DEBUG audited: around a page fault, around a store to a guest table, after a load of CR3;
and, where tables may be unsync, around the sync of what roots reach (mmu_audit.c of later releases).
An audit that finds something there does not stop the operation under way, so that nothing is left half done; the
call that made the operation raises AuditError after it.
"""
from dataclasses import dataclass

from shadowcore.engine.hooks cimport HOOK_RAISED, POINT_COUNT, POINT_POST_SYNC
from shadowcore.engine.invariants cimport audit_all, audit_violations, sc_audit
from shadowcore.engine.lagging cimport LAGGING_SYNCED
from shadowcore.engine.mmu cimport Mmu
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32
from shadowcore.engine.watch cimport watch_due, watch_look, watch_raised

from shadowcore.engine.audits import POINTS as _POINTS
from shadowcore.engine.invariants import Violation as _Violation
from shadowcore.errors import AuditError, ConfigError

Violation = _Violation
POINTS = _POINTS
assert len(POINTS) == POINT_COUNT


@dataclass(frozen=True)
class AuditReport:
    """violations: the first 64 of `count`; sptes: present shadow entries looked at.

    >>> report = sc.VM("16MiB").audit()
    >>> report.ok, report.count, report.violations
    (True, 0, ())
    """

    violations: tuple
    count: int
    sptes: int

    @property
    def ok(self) -> bool:
        """No violation."""
        return self.count == 0

    def __str__(self):
        if self.ok:
            return f"audit clean, {self.sptes} sptes"
        return f"{self.count} violation(s), {self.sptes} sptes\n" + "\n".join(map(str, self.violations))

    def _repr_html_(self):
        from shadowcore.notebook import table
        title = "audit clean" if self.ok else f"{self.count:,} violation(s)"
        return table(f"{title}, {self.sptes:,} sptes", (), ((str(violation),) for violation in self.violations))


def audit(Mmu mmu):
    """AuditReport of `mmu`, whatever was written into its arrays; EngineError while somebody can write to them."""
    cdef sc_audit a
    mmu.enter(True)
    with nogil:
        audit_all(mmu.c, &a)
    mmu.leave()
    error = watch_raised(&mmu.watch)
    if error is not None:
        raise error
    return AuditReport(audit_violations(&a), a.n, a.sptes)


cdef void _audit_here(sc_mmu *mmu, u32 point) noexcept nogil:
    """At a point: the first audit that finds something is kept until it is raised. Audits are what makes operations
    take long, so signals are looked for here."""
    cdef sc_audit *a = <sc_audit *>mmu.audit_report
    if mmu.audit_found:
        return
    audit_all(mmu, a)
    if point == POINT_POST_SYNC:
        mmu.design.audit(mmu, a, LAGGING_SYNCED)
    if mmu.watch != NULL and (mmu.watch.raised != NULL or (watch_due(mmu.watch) and watch_look(mmu.watch))):
        mmu.audit_found = HOOK_RAISED
    elif a.n:
        mmu.audit_found = point + 1


cdef class AuditPoints:
    """The points of `mmu` at which every invariant is checked: `names`, some of POINTS."""

    def __cinit__(self, Mmu mmu):
        self.mmu = mmu

    @property
    def names(self) -> tuple:
        return tuple(name for i, name in enumerate(POINTS) if self.mmu.c.audit_points >> i & 1)

    @names.setter
    def names(self, value):
        self.mmu.idle()
        if isinstance(value, str):
            value = (value,)
        for name in value:
            if name not in POINTS:
                raise ConfigError(f"audit_points: {name!r} is not one of {', '.join(POINTS)}")
        self.mmu.c.audit_points = sum(1 << POINTS.index(name) for name in set(value))
        self.mmu.c.audit_report = &self.c
        self.mmu.c.audit = _audit_here
        self.mmu.c.audit_found = 0
        self.mmu.audits = self

    def take(self):
        """AuditError for what an audit found since the last call, or None."""
        cdef u32 point = self.mmu.c.audit_found
        if point == 0:
            return None
        self.mmu.c.audit_found = 0
        return AuditError(audit_violations(&self.c), self.c.n, POINTS[point - 1])
