"""Write floods, counted page by page: as Linux 6.1 does, for any design that asks for it."""
from shadowcore.engine.page cimport sc_page
from shadowcore.engine.state cimport sc_mmu
from shadowcore.engine.types cimport u32

cdef inline bint page_floods(const sc_mmu *mmu, sc_page *page) noexcept nogil:
    """The emulator stores to the page's table. True: so many times since a fault last came through the page, and
    without as many stores to other tables in between as make it forget, that it is a flood."""
    cdef u32 last = page.flood_at
    if mmu.flood_threshold == 0:
        return False
    page.flood_at = mmu.store_clock
    if mmu.flood_forget and mmu.store_clock - last > mmu.flood_forget:
        page.flood = 0
    if page.flood < 255:
        page.flood += 1
    return page.flood >= mmu.flood_threshold
