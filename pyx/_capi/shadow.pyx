"""The tables that a vcpu's processor walks, as they lie in memory: for walkers and caches of the embedder's own."""
from libc.string cimport memset

from shadowcore._capi.handles cimport fail, leave, open_struct, sc_place, vcpu_of
from shadowcore._capi.header cimport SC_E_ARGUMENT, sc_pool, sc_root, sc_shadow_page, sc_vm
from shadowcore.engine.bits cimport PTE_P, pte_addr
from shadowcore.engine.memory cimport mem_frame_hpa, mem_pool_hpa
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.role cimport (
    ROLE_GLEVELS, ROLE_QUADRANT, role_access, role_direct, role_field, role_level,
)
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.types cimport MODE_PAE, RC_OK, u8, u32, u64


cdef void _root(const sc_mmu *mmu, const sc_vcpu *v, sc_root *root) noexcept nogil:
    cdef int i
    memset(<u8 *>root + sizeof(u32), 0, sizeof(sc_root) - sizeof(u32))
    root.hpa = root.pdpte[0] = root.pdpte[1] = root.pdpte[2] = root.pdpte[3] = ~<u64>0
    root.mode = <u32>v.hw.mode
    if mmu.nested:
        if v.guest.host_root:
            root.hpa = v.guest.host_root
    elif v.hw.mode == MODE_PAE:
        for i in range(4):
            if v.hw.pdpte[i] & PTE_P:
                root.pdpte[i] = v.hw.pdpte[i] & pte_addr()
    elif v.hw.root:
        root.hpa = v.hw.root


cdef int api_shadow_root(sc_vm vm, u32 vcpu, sc_root *root) noexcept nogil:
    cdef int rc
    cdef sc_place *p = open_struct(vm, root, sizeof(sc_root), "sc_root", &rc)
    cdef sc_vcpu *v
    if p == NULL:
        return rc
    rc = SC_E_ARGUMENT
    v = vcpu_of(p.mmu, vcpu)
    if v != NULL and not p.mmu.shadow and not p.mmu.nested:
        fail(SC_E_ARGUMENT, "the design has no tables but the guest's: the root is in CR3")
    elif v != NULL:
        _root(p.mmu, v, root)
        rc = RC_OK
    leave(p)
    return rc


cdef int api_shadow_pool(sc_vm vm, sc_pool *pool) noexcept nogil:
    cdef int rc
    cdef sc_place *p = open_struct(vm, pool, sizeof(sc_pool), "sc_pool", &rc)
    if p == NULL:
        return rc
    memset(<u8 *>pool + sizeof(u32), 0, sizeof(sc_pool) - sizeof(u32))
    if p.mmu.shadow or p.mmu.nested:
        pool.pages = p.mmu.pool_pages
        pool.active = p.mmu.n_active
        pool.tables = p.mmu.mem.pool
    pool.tables_hpa = mem_pool_hpa(0)
    pool.ram = p.mmu.mem.ram
    pool.ram_hpa = mem_frame_hpa(p.mmu.mem, 0)
    pool.ram_size = p.mmu.mem.nframes << 12
    leave(p)
    return RC_OK


cdef int api_shadow_page(sc_vm vm, u32 number, sc_shadow_page *page) noexcept nogil:
    cdef int rc
    cdef sc_place *p = open_struct(vm, page, sizeof(sc_shadow_page), "sc_shadow_page", &rc)
    cdef const sc_page *of
    if p == NULL:
        return rc
    if not (p.mmu.shadow or p.mmu.nested) or number >= p.mmu.pool_pages:
        rc = fail(SC_E_ARGUMENT, "number is that of no page of the pool")
    else:
        of = &p.mmu.pages[number]
        memset(<u8 *>page + sizeof(u32), 0, sizeof(sc_shadow_page) - sizeof(u32))
        page.hpa = mem_pool_hpa(number)
        page.active = of.active
        if of.active or of.root_count:
            page.gfn = of.gfn
            page.level = <u8>role_level(of.role)
            page.guest_mode = <u8>role_field(of.role, ROLE_GLEVELS, 15)
            page.quadrant = <u8>role_field(of.role, ROLE_QUADRANT, 3)
            page.direct = role_direct(of.role)
            page.rights = <u8>role_access(of.role)
            page.unsync = of.unsync
            page.root_count = of.root_count
    leave(p)
    return rc
