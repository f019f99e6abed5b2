"""Registers, and what the engine did: counters, prices, events, audits."""
from libc.string cimport memcpy, memset

from shadowcore._capi.handles cimport (
    MAX_VMS, enter, fail, fail_python, fail_rc, fail_struct, leave, open_struct, places, refused, sc_place, vcpu_of,
    with_python,
)
from shadowcore._capi.header cimport (
    SC_AC, SC_CPL, SC_CR0, SC_CR2, SC_CR3, SC_CR4, SC_E_ARGUMENT, SC_E_NULL, SC_E_PYTHON, SC_EFER, SC_PKRU,
    sc_audit_result, sc_counters, sc_event, sc_event_function, sc_reference, sc_reference_function, sc_vm,
)
from shadowcore.engine.access cimport (
    OP_CR0, OP_CR3, OP_CR4, OP_EFER, OP_INVLPG, OP_INVPCID, OP_PKRU, sc_op, sc_result, vcpu_op,
)
from shadowcore.engine.counters cimport sc_stats
from shadowcore.engine.exits cimport events_tell
from shadowcore.engine.hooks cimport EVENT_COUNT
from shadowcore.engine.invariants cimport audit_all, sc_audit
from shadowcore.engine.mmu cimport mmu_listen
from shadowcore.engine.prices cimport prices_are_sane, prices_cycles, prices_of, sc_prices
from shadowcore.engine.registers cimport load_ac, load_init
from shadowcore.engine.state cimport sc_mmu, sc_reference as engine_reference, sc_reference_hook, sc_vcpu
from shadowcore.engine.types cimport RC_AUDIT, RC_OK, SC_NONE, u8, u32, u64

from shadowcore.engine.costs import find as find_costs
from shadowcore.engine.levels import of_design

cdef sc_prices _price_lists[MAX_VMS]  # each of the handle in the place of that number


# Registers

cdef int api_register_read(sc_vm vm, u32 vcpu, u32 reg, u64 *value) noexcept nogil:
    cdef sc_place *p
    cdef sc_vcpu *v
    cdef int rc = RC_OK
    if value == NULL:
        return fail(SC_E_NULL, "value is NULL")
    p = enter(vm)
    if p == NULL:
        return refused(vm)
    v = vcpu_of(p.mmu, vcpu)
    if v == NULL:
        rc = SC_E_ARGUMENT
    elif reg == SC_CR0:
        value[0] = v.cr0
    elif reg == SC_CR2:
        value[0] = v.cr2
    elif reg == SC_CR3:
        value[0] = v.cr3
    elif reg == SC_CR4:
        value[0] = v.cr4
    elif reg == SC_EFER:
        value[0] = v.efer
    elif reg == SC_PKRU:
        value[0] = v.guest.pkru
    elif reg == SC_AC:
        value[0] = v.guest.ac
    elif reg == SC_CPL:
        value[0] = v.cpl
    else:
        rc = fail(SC_E_ARGUMENT, "reg is no register")
    leave(p)
    return rc


cdef int _load(sc_mmu *mmu, sc_vcpu *v, u32 op, u64 value) noexcept nogil:
    cdef sc_op o
    memset(&o, 0, sizeof(o))
    o.op = <u8>op
    o.addr = o.value[0] = value
    return _done(mmu, v, &o)


cdef int _done(sc_mmu *mmu, sc_vcpu *v, const sc_op *o) noexcept nogil:
    cdef sc_result r
    cdef int rc = vcpu_op(mmu, v, o, True, &r)
    if rc >= 0 and mmu.audit_found:
        rc = RC_AUDIT
    return rc if rc >= 0 else fail_rc(mmu, rc)


cdef int api_register_load(sc_vm vm, u32 vcpu, u32 reg, u64 value) noexcept nogil:
    cdef sc_place *p = enter(vm)
    cdef sc_vcpu *v
    cdef int rc = RC_OK
    if p == NULL:
        return refused(vm)
    v = vcpu_of(p.mmu, vcpu)
    if v == NULL:
        rc = SC_E_ARGUMENT
    elif reg == SC_CR0:
        rc = _load(p.mmu, v, OP_CR0, value)
    elif reg == SC_CR2:
        v.cr2 = value
    elif reg == SC_CR3:
        rc = _load(p.mmu, v, OP_CR3, value)
    elif reg == SC_CR4:
        rc = _load(p.mmu, v, OP_CR4, value)
    elif reg == SC_EFER:
        rc = _load(p.mmu, v, OP_EFER, value)
    elif reg == SC_PKRU and value >> 32 == 0:
        rc = _load(p.mmu, v, OP_PKRU, value)
    elif reg == SC_AC and value <= 1:
        load_ac(p.mmu, v, value != 0)
    elif reg == SC_CPL and (value == 0 or value == 3):
        v.cpl = <u32>value
    else:
        rc = fail(SC_E_ARGUMENT, "reg is no register, or value none that it can have")
    leave(p)
    return rc


cdef int api_invlpg(sc_vm vm, u32 vcpu, u64 gva) noexcept nogil:
    cdef sc_place *p = enter(vm)
    cdef sc_vcpu *v
    cdef int rc
    if p == NULL:
        return refused(vm)
    v = vcpu_of(p.mmu, vcpu)
    rc = SC_E_ARGUMENT if v == NULL else _load(p.mmu, v, OP_INVLPG, gva)
    leave(p)
    return rc


cdef int api_invpcid(sc_vm vm, u32 vcpu, u64 kind, const u64 *descriptor) noexcept nogil:
    cdef sc_place *p
    cdef sc_vcpu *v
    cdef sc_op o
    cdef int rc = SC_E_ARGUMENT
    if descriptor == NULL:
        return fail(SC_E_NULL, "descriptor is NULL")
    memset(&o, 0, sizeof(o))
    o.op = OP_INVPCID
    o.size = <u8>min(kind, 0xFF)
    o.value[0] = descriptor[0]
    o.addr = descriptor[1]
    p = enter(vm)
    if p == NULL:
        return refused(vm)
    v = vcpu_of(p.mmu, vcpu)
    if v != NULL:
        o.user = v.cpl == 3
        rc = _done(p.mmu, v, &o)
    leave(p)
    return rc


cdef int api_vcpu_init(sc_vm vm, u32 vcpu) noexcept nogil:
    cdef sc_place *p = enter(vm)
    cdef sc_vcpu *v
    if p == NULL:
        return refused(vm)
    v = vcpu_of(p.mmu, vcpu)
    if v != NULL:
        load_init(p.mmu, v)
    leave(p)
    return RC_OK if v != NULL else SC_E_ARGUMENT


# Counters, prices, events, audits

cdef int api_counters(sc_vm vm, sc_counters *counters) noexcept nogil:
    cdef int rc
    cdef sc_place *p = open_struct(vm, counters, sizeof(sc_counters), "sc_counters", &rc)
    if p == NULL:
        return rc
    memcpy(counters.exits, p.mmu.stats, sizeof(sc_stats))       # the same fields in the same order: see below
    leave(p)
    return RC_OK


assert sizeof(sc_counters) == 8 + sizeof(sc_stats)


cdef bint _size_is_known(const sc_prices *prices) noexcept nogil:
    return prices.struct_size == sizeof(sc_prices) or (
        prices.struct_size == <size_t>&prices.violation - <size_t>prices)


cdef int _prices_with_gil(sc_vm vm, const char *preset, sc_prices *prices) noexcept with gil:
    """vm: 0 for that of no design."""
    cdef sc_place *p
    cdef u32 size = prices.struct_size
    cdef sc_prices full
    try:
        costs = find_costs((<bytes>preset).decode())
        if vm:
            p = enter(vm)
            if p == NULL:
                return refused(vm)
            owner = <object>p.owner
            leave(p)
            costs = costs.replace(levels=of_design(costs.levels, owner.mmu.design.engine))
        prices_of(costs, &full)
        memcpy(prices, &full, size)
        prices.struct_size = size
        return RC_OK
    except BaseException as error:
        return fail_python(error)


cdef int _prices(sc_vm vm, const char *preset, sc_prices *prices) noexcept nogil:
    if preset == NULL or prices == NULL:
        return fail(SC_E_NULL, "preset or prices is NULL")
    if not _size_is_known(prices):
        return fail_struct("sc_prices", prices.struct_size, sizeof(sc_prices))
    if with_python() != RC_OK:
        return SC_E_PYTHON
    return _prices_with_gil(vm, preset, prices)


cdef int api_prices(const char *preset, sc_prices *prices) noexcept nogil:
    return _prices(0, preset, prices)


cdef int api_prices_for(sc_vm vm, const char *preset, sc_prices *prices) noexcept nogil:
    cdef sc_place *p = enter(vm)
    if p == NULL:
        return refused(vm)
    leave(p)
    return _prices(vm, preset, prices)


cdef int api_set_prices(sc_vm vm, const sc_prices *prices) noexcept nogil:
    cdef sc_place *p
    cdef sc_prices copy
    if prices != NULL:
        if not _size_is_known(prices):
            return fail_struct("sc_prices", prices.struct_size, sizeof(sc_prices))
        memset(&copy, 0, sizeof(copy))  # what a caller of before does not know stays 0
        memcpy(&copy, prices, prices.struct_size)
        prices = &copy
        if prices.reserved or not prices_are_sane(prices):
            return fail(SC_E_ARGUMENT, "prices->reserved is not 0, or a price is negative or no number")
    p = enter(vm)
    if p == NULL:
        return refused(vm)
    p.prices = NULL
    if prices != NULL:
        _price_lists[p - places] = prices[0]
        p.prices = &_price_lists[p - places]
    leave(p)
    return RC_OK


cdef int api_cycles(sc_vm vm, double *cycles) noexcept nogil:
    cdef sc_place *p
    if cycles == NULL:
        return fail(SC_E_NULL, "cycles is NULL")
    p = enter(vm)
    if p == NULL:
        return refused(vm)
    cycles[0] = prices_cycles(p.prices, NULL, p.mmu.stats) if p.prices != NULL else 0
    leave(p)
    return RC_OK


cdef void _on_engine_event(sc_mmu *mmu, u32 kind, u32 detail, u32 vcpu, u64 address) noexcept nogil:
    cdef sc_place *p = <sc_place *>mmu.event_context
    cdef sc_event event
    cdef int busy = mmu.mem.busy
    event.struct_size = sizeof(sc_event)
    event.kind = kind
    event.detail = detail
    event.vcpu = vcpu
    event.address = address
    event.vm = p.handle
    event.frames = mmu.event_frames
    mmu.mem.busy = True             # the callback may not use its VM, by way of Python either
    p.function(p.context, &event)
    mmu.mem.busy = busy


cdef int api_on_event(sc_vm vm, u32 mask, sc_event_function function, void *context) noexcept nogil:
    cdef sc_place *p
    if mask >> EVENT_COUNT:
        return fail(SC_E_ARGUMENT, "mask has bits that are no SC_EVENT_*")
    p = enter(vm)
    if p == NULL:
        return refused(vm)
    p.function = function
    p.context = context
    events_tell(p.mmu, mask if function != NULL else 0, _on_engine_event, p)
    leave(p)
    return RC_OK


assert sizeof(sc_reference) == sizeof(engine_reference)     # the same fields in the same order: tests have them read


cdef void _on_engine_references(void *place, const engine_reference *made, u32 n) noexcept nogil:
    cdef sc_place *p = <sc_place *>place
    cdef int busy = p.mmu.mem.busy
    p.mmu.mem.busy = True           # as for events
    p.listener(p.listening, <const sc_reference *>made, n)
    p.mmu.mem.busy = busy


cdef int _listen_with_gil(sc_vm vm, sc_reference_function function, void *context) noexcept with gil:
    cdef sc_place *p = enter(vm)
    if p == NULL:
        return refused(vm)
    p.mmu.mem.busy = False          # as slots.pyx
    try:
        mmu_listen((<object>p.owner).mmu, <sc_reference_hook>_on_engine_references if function != NULL else NULL, p)
        p.listener = function
        p.listening = context
        return RC_OK
    except BaseException as error:
        return fail_python(error)
    finally:
        leave(p)


cdef int api_on_references(sc_vm vm, sc_reference_function function, void *context) noexcept nogil:
    return _listen_with_gil(vm, function, context) if with_python() == RC_OK else SC_E_PYTHON


cdef int api_audit(sc_vm vm, sc_audit_result *result) noexcept nogil:
    cdef int rc
    cdef sc_place *p = open_struct(vm, result, sizeof(sc_audit_result), "sc_audit_result", &rc)
    cdef sc_audit a
    if p == NULL:
        return rc
    audit_all(p.mmu, &a)
    memset(<u8 *>result + sizeof(u32), 0, sizeof(sc_audit_result) - sizeof(u32))
    result.violations = a.n
    result.sptes = a.sptes
    result.page = SC_NONE
    if a.n:
        result.invariant = a.found[0].invariant
        result.page = a.found[0].page
        result.index = a.found[0].index
        result.gfn = a.found[0].gfn
    leave(p)
    return RC_OK
