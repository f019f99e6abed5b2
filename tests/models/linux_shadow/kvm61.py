"""The shadow MMU of Linux 6.1 in plain Python, from a description of what it does; slow and meant to be read.

`version=612` is that of Linux 6.12. Memory, slots and dirty logs are in `memory`, what one sees of the state in `view`.

Past 500 lines, for it is one mechanism, written as one class so that it can be read from end to end.
"""

from host import Host, Slot
from kvmbits import (
    ACC,
    ACC_ALL,
    CR0_PG,
    CR0_WP,
    DEV,
    DEVICE_ACCESS,
    DIRECT,
    EMULATE,
    FIXED,
    GP,
    HW,
    INVALID,
    LMA,
    LME,
    MP,
    MW,
    NX,
    NXE,
    PAE,
    PCIDE,
    PF_I,
    PF_P,
    PF_R,
    PF_U,
    PF_W,
    PGE,
    PS,
    PSE,
    QUAD,
    RETRY,
    RNX,
    RSMAP,
    RSMEP,
    RWP,
    SMAP,
    SMEP,
    SPURIOUS,
    U_,
    W_,
    X_,
    A,
    D,
    Fault,
    P,
    U,
    W,
    bits,
)
from memory import NEXT_GENERATION, Memory
from view import View

# Counters of a processor, and of the machine.
OWN_COUNTERS = (
    "pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast", "pf_mmio_spte_created", "pf_guest", "tlb_flush",
    "invlpg", "insn_emulation", "insn_emulation_fail",
)  # fmt: skip
COUNTERS = (
    "mmu_shadow_zapped", "mmu_pte_write", "mmu_pde_zapped", "mmu_flooded", "mmu_recycled", "mmu_cache_miss",
    "mmu_unsync", "pages_4k", "pages_2m", "pages_1g", "remote_tlb_flush", "remote_tlb_flush_requests",
    "max_mmu_rmap_size",
)  # fmt: skip
# What each processor has of its own; the rest is the machine's.
VCPU = (
    "cr0", "cr3", "cr4", "efer", "ac", "pdptrs", "cpu_role", "root_role", "level", "direct", "nxe", "rsv", "root",
    "pae", "pgd", "prev", "mmio", "retry", "requests", "own",
)  # fmt: skip
PAGES = ("", "pages_4k", "pages_2m", "pages_1g")


class Page:
    def __init__(self, gfn, role, gen):
        self.gfn, self.role, self.roots, self.gen = gfn, role, 0, gen
        self.spt, self.gfns, self.acc = [0] * 512, [0] * 512, [0] * 512
        self.kids = [None] * 512
        self.parents = set()
        self.unsync, self.children, self.bitmap, self.flood = False, 0, 0, 0

    level = property(lambda s: s.role & 15)
    direct = property(lambda s: s.role >> DIRECT & 1)
    invalid = property(lambda s: s.role >> INVALID & 1)
    size = property(lambda s: 4 if s.role & 16 else 8)


class Walk:
    pass


class Mmu(Memory, View):
    def __init__(self, ram, nframes, limit, host=None, maxphyaddr=40, version=61, vcpus=1, log_mode="plain"):
        """`ram`: the client's memory, of which the first `nframes` frames are slot 0. `log_mode`: "plain", "manual" or
        "initially set", how dirty frames are protected."""
        self.ram, self.limit, self.version, self.log_mode = ram, limit, version, log_mode
        self.host = host or Host(len(ram) >> 12)
        self.host.changed = self.invalidate_frames
        self.slots = {0: Slot(0, nframes, 0)}
        self.generation, self.changes, self.valid_gen = NEXT_GENERATION, 0, 0
        self.maxphyaddr = maxphyaddr
        self.c = dict.fromkeys(COUNTERS, 0)
        self.events = []
        self.active = []  # oldest first
        self.used = 0
        self.hash = {}
        self.indirect = 0
        self.tracked = {}
        self.disallow = {}
        self.rmap = ({}, {}, {}, {})
        self.all_requests = [{"flush"} if version >= 612 else set() for _ in range(vcpus)]
        self.vcpus = [None] * vcpus
        for self.vcpu in reversed(range(vcpus)):
            self.init_vcpu()
            self.vcpus[self.vcpu] = self.of_vcpu()

    def init_vcpu(self):
        self.requests = self.all_requests[self.vcpu]
        self.own = dict.fromkeys(OWN_COUNTERS, 0)
        self.cr0, self.cr3, self.cr4, self.efer, self.ac = 0x60000011, 0, 0, 1, 0
        self.pdptrs = [0] * 4
        self.root, self.pae, self.pgd = None, None, 0
        self.prev = [(None, 0)] * 3
        self.mmio = (0, 0, 0, 0)
        self.retry = (0, 0)
        self.init_roles()

    def of_vcpu(self):
        return {name: getattr(self, name) for name in VCPU}

    def select(self, n):
        """From now on the machine's fields are those of processor n."""
        if n != self.vcpu:
            self.vcpus[self.vcpu] = self.of_vcpu()
            self.__dict__.update(self.vcpus[n])
            self.vcpu = n

    # Roles
    def init_roles(self):
        role = cpu = ACC_ALL << ACC
        self.level = 0
        if self.cr0 & CR0_PG:
            wp = self.cr0 >> 16 & 1
            role |= wp << RWP | ((self.cr4 >> 20 & 1) & (1 - wp)) << RSMEP | ((self.cr4 >> 21 & 1) & (1 - wp)) << RSMAP
            role |= (not self.cr4 & PAE) << 4
            self.level = 4 if self.efer & LMA else 3 if self.cr4 & PAE else 2
            cpu = role | self.level | (self.efer >> 11 & 1) << RNX
        else:
            role |= 1 << DIRECT
            cpu = role
        self.cpu_role = cpu
        self.root_role = role | max(self.level, 3) | 1 << RNX
        self.direct = bool(role >> DIRECT & 1)
        self.nxe = bool(self.efer & NXE) and not self.direct
        self.reserved_masks()

    def reserved_masks(self):
        high = bits(self.maxphyaddr, 62 if self.level == 3 else 51)
        if not self.nxe:
            high |= 1 << 63
        if self.level == 2:
            self.rsv = {(1, 0): 0, (2, 0): 0, (2, 1): bits(17, 21), (1, 1): 0}
        elif self.level == 3:
            self.rsv = {(1, 0): high, (1, 1): high, (2, 0): high, (2, 1): high | bits(13, 20)}
        else:
            self.rsv = {
                (1, 0): high,
                (1, 1): high,
                (2, 0): high,
                (2, 1): high | bits(13, 20),
                (3, 0): high,
                (3, 1): high | bits(13, 29),
                (4, 0): high | 0x180,
                (4, 1): high | 0x180,
            }

    def reserved(self, gpte, level):
        return gpte & self.rsv[level, gpte >> 7 & 1]

    def gpte_access(self, gpte):
        return (gpte & 6 | 1) ^ (gpte >> 63)

    def gpte_gfn(self, gpte):
        return (gpte & 0xFFFFFFFFFF000) >> 12 if self.level != 2 else (gpte & 0xFFFFF000) >> 12

    # Guest walk
    def walk(self, va, access):
        """A and D are set; Fault."""
        w = Walk()
        size = 4 if self.level == 2 else 8
        level = self.level
        table = self.cr3 & 0xFFFFFFFFFF000
        if level == 3:
            e = self.pdptrs[va >> 30 & 3]
            if not e & 1:
                self.walk_error(access, 0)
            table = e & 0xFFFFFFFFFF000
            level = 2
        if self.level == 2:
            table &= 0xFFFFFFFF
        w.max = level
        w.table, w.gpa, w.pte, w.above = {}, {}, {}, {}
        rights = 7
        while True:
            shift = 12 + (10 if size == 4 else 9) * (level - 1)
            index = va >> shift & (1023 if size == 4 else 511)
            if self.slot(table >> 12) is None:
                self.walk_error(access, 0)
            gpa = table + index * size
            e = self.read(gpa, size)
            w.table[level], w.gpa[level] = table >> 12, gpa
            if not e & 1:
                self.walk_error(access, 0)
            if self.reserved(e, level):
                self.walk_error(access, PF_R | PF_P)
            w.pte[level], w.above[level] = e, rights
            rights &= self.gpte_access(e)
            if level == 1 or (e & 0x80 and ((level == 2 and (self.cr4 & PSE or self.level != 2)) or level == 3)):
                break
            table = self.gpte_gfn(e) << 12
            level -= 1
        w.level, w.access = level, rights
        if self.permission(rights, access):
            self.walk_error(access, PF_P)
        gfn = self.gpte_gfn(e)
        off = (va & (1 << shift) - 1) >> 12
        gfn = (gfn & ~((1 << shift - 12) - 1)) + off
        if self.level == 2 and level == 2:
            gfn += (e & 0x1E000) << 7 & ~0
            gfn = ((e & 0xFFC00000) >> 12) + off + ((e >> 13 & 15) << 20)
        w.gfn = gfn
        write = access & PF_W
        if not write and not e & 0x40:
            w.access &= ~W_
        for lv in range(w.max, level - 1, -1):
            e = old = w.pte[lv]
            if self.slot(w.table[lv]).readonly:
                continue
            if not e & 0x20:
                self.event(5, w.gpa[lv])
                e |= 0x20
            if lv == level and write and not e & 0x40:
                self.event(6, w.gpa[lv])
                e |= 0x40
            if e != old:
                self.write(w.gpa[lv], e, size)
                self.mark_dirty(w.table[lv])
                w.pte[lv] = e
        return w

    def walk_error(self, access, code):
        code |= access & (PF_W | PF_U)
        if access & PF_I and (self.nxe or self.cr4 & SMEP):
            code |= PF_I
        raise Fault(code)

    def permission(self, rights, access):
        user = access & PF_U
        if access & PF_W and not rights & W_ and (user or self.cr0 & CR0_WP):
            return True
        if user and not rights & U_:
            return True
        if access & PF_I and self.nxe and not rights & X_:
            return True
        if not user and rights & U_:
            if access & PF_I and self.cr4 & SMEP:
                return True
            if not access & PF_I and self.cr4 & SMAP and not self.ac:
                return True
        return False

    # Books
    def event(self, kind, a=0, b=0, c=0):
        self.events.append((kind, a, b, c))

    def page_event(self, kind, sp):
        self.event(kind, sp.gfn, sp.role, 2 * sp.roots + sp.unsync)

    def remote_flush(self):
        self.c["remote_tlb_flush_requests"] += 1
        self.request_all("flush")

    def request_all(self, what):
        for requests in self.all_requests:
            requests.add(what)

    def of_gfn(self, gfn):
        return [s for s in self.hash.get(gfn, ()) if not s.direct and not s.invalid]

    # Sptes
    def spte_clear(self, sp, i):
        old = sp.spt[i]
        sp.spt[i] = 0
        return old

    def drop_spte(self, sp, i):
        old = sp.spt[i]
        sp.spt[i] = 0
        if old & MP:
            self.c[PAGES[sp.level]] -= 1
            self.rmap[sp.level][self.index_gfn(sp, i)].discard((sp, i))

    def index_gfn(self, sp, i):
        if sp.direct:
            return sp.gfn + (i << 9 * (sp.level - 1))
        return sp.gfns[i]

    def update(self, sp, i, new):
        old = sp.spt[i]
        sp.spt[i] = new
        if not old & MP:
            return False
        return bool((old & MW and not new & W) or (old & A and not new & A) or (old & D and not new & D))

    def write_protect(self, gfn):
        flush = False
        for level in (1, 2, 3):
            base = gfn >> 9 * (level - 1) << 9 * (level - 1)
            for sp, i in self.rmap[level].get(base, ()):
                s = sp.spt[i]
                if s & (W | MW):
                    flush |= self.update(sp, i, s & ~(W | MW))
        return flush

    def lpage(self, gfn, n):
        for level in (2, 3):
            k = level, gfn >> 9 * (level - 1)
            self.disallow[k] = self.disallow.get(k, 0) + n

    # Pages
    def account(self, sp, n):
        self.indirect += n
        if sp.level > 1:
            self.tracked[sp.gfn] = self.tracked.get(sp.gfn, 0) + n
        self.lpage(sp.gfn, n)
        if n > 0 and self.write_protect(sp.gfn):
            self.remote_flush()

    def get_page(self, gfn, role):
        invalid = []
        found = None
        for sp in list(self.hash.get(gfn, ())):
            if sp.invalid:
                continue
            if sp.role != role:
                if role & 15 > 1 and sp.unsync:
                    self.prepare_zap(sp, invalid)
                continue
            if not sp.direct:
                if sp.unsync:
                    r = self.sync_page(sp)
                    if r < 0:
                        self.prepare_zap(sp, invalid)
                        break
                    if r > 0:
                        self.remote_flush()
                sp.flood = 0
            found = sp
            break
        if found is None:
            self.c["mmu_cache_miss"] += 1
        self.commit(invalid)
        if found is None:
            found = Page(gfn, role, self.valid_gen)
            self.active.append(found)
            self.used += 1
            self.hash.setdefault(gfn, []).insert(0, found)
            if not found.direct:
                self.account(found, 1)
            self.page_event(7, found)
        else:
            self.page_event(8, found)
        return found

    def commit(self, invalid):
        if invalid:
            self.remote_flush()
            for sp in invalid:
                self.hash[sp.gfn].remove(sp)

    def flush_or_zap(self, invalid, flush):
        if invalid:
            self.commit(invalid)
        elif flush:
            self.remote_flush()

    def prepare_zap(self, sp, invalid):
        """Returns the number zapped, and whether other pages went."""
        self.page_event(11, sp)
        self.c["mmu_shadow_zapped"] += 1
        n = 0
        if sp.level > 1:
            while True:
                some, vec = self.unsync_walk(sp)
                if not some:
                    break
                for page, path in self.each(vec):
                    self.prepare_zap(page, invalid)
                    self.clear_parents(path)
                    n += 1
        for i in range(512):
            if sp.spt[i]:
                self.zap_pte(sp, i)
        for parent, i in list(sp.parents):
            self.drop_parent(sp, parent, i)
        unstable = n
        if not sp.invalid and not sp.direct:
            self.account(sp, -1)
        if sp.unsync:
            self.unlink_unsync(sp)
        if not sp.roots:
            n += 1
            if not sp.invalid:
                self.active.remove(sp)
            invalid.append(sp)
            self.used -= 1
        else:
            zapped_root = not sp.invalid
            if not sp.invalid:
                self.active.remove(sp)
            if zapped_root:
                self.request_all("obsolete")
        sp.role |= 1 << INVALID
        return n, unstable

    def zap_pte(self, sp, i):
        s = sp.spt[i]
        if s & MP:
            if sp.level == 1 or s & PS:
                self.drop_spte(sp, i)
            else:
                self.drop_parent(sp.kids[i], sp, i)
        else:
            sp.spt[i] = 0

    def drop_parent(self, child, sp, i):
        child.parents.discard((sp, i))
        sp.spt[i] = 0
        sp.kids[i] = None

    def link(self, sp, i, child):
        if sp.spt[i] & MP:
            self.drop_spte(sp, i)
            self.remote_flush()
        sp.spt[i] = P | W | U | A | MP
        sp.kids[i] = child
        child.parents.add((sp, i))
        if child.children or child.unsync:
            self.mark_unsync(sp, i)

    def unprotect(self, gfn):
        invalid = []
        for sp in self.of_gfn(gfn):
            self.prepare_zap(sp, invalid)
        zapped = bool(invalid)
        self.commit(invalid)
        return zapped

    def make_available(self):
        avail = max(self.limit - self.used, 0)
        if avail >= 5:
            return
        want, total, invalid = 25 - avail, 0, []
        again = True
        while again:
            again = False
            for sp in list(self.active):
                if sp.roots:
                    continue
                n, unstable = self.prepare_zap(sp, invalid)
                total += n
                if total >= want:
                    break
                if unstable:
                    again = True
                    break
        self.commit(invalid)
        self.c["mmu_recycled"] += total

    # Unsync
    def mark_unsync(self, sp, i):
        if sp.bitmap >> i & 1:
            return
        sp.bitmap |= 1 << i
        sp.children += 1
        if sp.children > 1:
            return
        self.mark_parents(sp)

    def mark_parents(self, sp):
        for parent, i in list(sp.parents):
            self.mark_unsync(parent, i)

    def clear_bit(self, sp, i):
        sp.children -= 1
        sp.bitmap &= ~(1 << i)

    def unlink_unsync(self, sp):
        self.page_event(9, sp)
        sp.unsync = False
        self.c["mmu_unsync"] -= 1

    def unsync_walk(self, sp):
        vec = []
        if not sp.children:
            return 0, vec
        self.vec_add(vec, sp, -1)
        return self.unsync_walk_below(sp, vec), vec

    def vec_add(self, vec, sp, i):
        if sp.unsync and any(p is sp for p, _ in vec):
            return False
        vec.append((sp, i))
        return len(vec) == 16

    def unsync_walk_below(self, sp, vec):
        n = 0
        m = sp.bitmap
        i = -1
        while m >> (i + 1):
            i += 1
            if not m >> i & 1:
                continue
            s = sp.spt[i]
            if not s & MP or s & PS:
                self.clear_bit(sp, i)
                continue
            kid = sp.kids[i]
            if kid.children:
                if self.vec_add(vec, kid, i):
                    return -1
                r = self.unsync_walk_below(kid, vec)
                if not r:
                    self.clear_bit(sp, i)
                elif r > 0:
                    n += r
                else:
                    return r
            elif kid.unsync:
                n += 1
                if self.vec_add(vec, kid, i):
                    return -1
            else:
                self.clear_bit(sp, i)
        return n

    def each(self, vec):
        """Leaves of the vector, each with its path: idx and parent by level."""
        parent, idx = [None] * 6, [0] * 6
        if not vec:
            return
        level = vec[0][0].level
        parent[level - 2] = vec[0][0]
        parent[level - 1] = None
        for sp, i in vec[1:]:
            idx[sp.level - 1] = i
            if sp.level == 1:
                yield sp, (parent, idx)
            else:
                parent[sp.level - 2] = sp

    def clear_parents(self, path):
        parent, idx = path
        level = 0
        while True:
            sp = parent[level]
            if sp is None:
                return
            self.clear_bit(sp, idx[level])
            level += 1
            if sp.children:
                return

    def sync_children(self, root):
        flush, invalid = False, []
        while True:
            some, vec = self.unsync_walk(root)
            if not some:
                break
            protected = False
            for sp, _ in self.each(vec):
                protected |= self.write_protect(sp.gfn)
            if protected:
                self.flush_or_zap(invalid, True)
                invalid = []
                flush = False
            for sp, path in self.each(vec):
                self.unlink_unsync(sp)
                r = self.sync_page(sp)
                if r < 0:
                    self.prepare_zap(sp, invalid)
                flush |= r > 0
                self.clear_parents(path)
        self.flush_or_zap(invalid, flush)

    def table_gpa(self, sp):
        return sp.gfn << 12 | (2048 * (sp.role >> QUAD & 3) if sp.size == 4 else 0)

    def gpte_invalid(self, sp, i, gpte):
        if gpte & 0x21 == 0x21 and not self.reserved(gpte, 1):
            return False
        self.drop_spte(sp, i)
        return True

    def clean(self, access, gpte):
        return access if gpte & 0x40 else access & ~W_

    def sync_page(self, sp):
        flush = False
        for i in range(512):
            if sp.spt[i]:
                flush |= self.sync_spte(sp, i)
        return int(flush)

    def sync_spte(self, sp, i):
        """Make one entry of an unsync page what the guest's entry says; whether a flush is due."""
        s = sp.spt[i]
        gpte = self.read(self.table_gpa(sp) + i * sp.size, sp.size)
        if self.gpte_invalid(sp, i, gpte):
            return True
        gfn = self.gpte_gfn(gpte)
        access = self.clean(sp.role >> ACC & 7 & self.gpte_access(gpte), gpte)
        if s & DEV:
            if sp.gfns[i] != gfn:
                sp.spt[i] = 0
            else:
                self.mark_mmio(sp, i, gfn, access)
            return False
        if gfn != sp.gfns[i]:
            self.drop_spte(sp, i)
            return True
        if self.version >= 612 and sp.acc[i] == access:
            return False
        sp.acc[i] = access
        new, _ = self.make_spte(sp, access, gfn, s, True, False, s & HW)
        return self.update(sp, i, new)

    def sync_roots(self):
        if self.direct or (self.root is None and self.pae is None):
            return
        if self.level >= 4:
            if not (self.root.unsync or self.root.children):
                self.clear_mmio()
                return
            self.clear_mmio()
            self.sync_children(self.root)
            return
        self.clear_mmio()
        for sp in self.pae:
            if sp is not None:
                self.sync_children(sp)

    def sync_prev_roots(self):
        which = [i for i, (sp, _) in enumerate(self.prev) if sp is not None and (sp.unsync or sp.children)]
        self.free_roots(which, False)

    # Leaves
    def try_to_unsync(self, gfn, can_unsync, prefetch):
        if self.tracked.get(gfn):
            return False
        for sp in self.of_gfn(gfn):
            if not can_unsync:
                return False
            if sp.unsync:
                continue
            if prefetch:
                return False
            assert sp.level == 1
            self.page_event(10, sp)
            self.c["mmu_unsync"] += 1
            sp.unsync = True
            self.mark_parents(sp)
        return True

    def make_spte(self, sp, access, gfn, old, prefetch, can_unsync, host_writable):
        s = P | MP
        protected = False
        if not prefetch:
            s |= A
        if not access & X_:
            s |= NX
        if access & U_:
            s |= U
        if sp.level > 1:
            s |= PS
        if host_writable:
            s |= HW
        else:
            access &= ~W_
        if access & W_:
            s |= W | MW
            if old & W:
                self.mark_dirty(gfn)
                return s, False
            if not self.try_to_unsync(gfn, can_unsync, prefetch):
                protected = True
                s &= ~(W | MW)
                access &= ~W_
        if access & W_:
            s |= D
            self.mark_dirty(gfn)
        return s, protected

    def mark_mmio(self, sp, i, gfn, access):
        self.event(13, gfn, access & 6 | 1)
        sp.spt[i] = DEV | P | access & 6 | self.generation << 16
        sp.gfns[i] = gfn
        sp.acc[i] = access & 6

    def set_spte(self, sp, i, access, gfn, fault, host_writable=True):
        """fault: None for a prefetch, else whether it is a write."""
        flush = False
        if self.slot(gfn) is None:
            self.own["pf_mmio_spte_created"] += 1
            self.mark_mmio(sp, i, gfn, access)
            return EMULATE
        was = False
        s = sp.spt[i]
        if s & MP:
            if sp.level > 1 and not s & PS:
                self.drop_parent(sp.kids[i], sp, i)
                flush = True
            elif self.index_gfn(sp, i) != gfn:
                self.drop_spte(sp, i)
                flush = True
            else:
                was = True
        new, protected = self.make_spte(sp, access, gfn, sp.spt[i], fault is None, True, host_writable)
        ret = FIXED
        if sp.spt[i] == new:
            ret = SPURIOUS
        else:
            flush |= self.update(sp, i, new)
            self.event(12, gfn, new, sp.level)
        if protected and fault:
            ret = EMULATE
        if flush:
            self.remote_flush()
        if not was:
            sp.gfns[i] = gfn
            self.c[PAGES[sp.level]] += 1
            rm = self.rmap[sp.level].setdefault(gfn, set())
            self.c["max_mmu_rmap_size"] = max(self.c["max_mmu_rmap_size"], len(rm))
            rm.add((sp, i))
        sp.acc[i] = access
        return ret

    def prefetch_gpte(self, sp, i, gpte, logged):
        """Map what a guest entry says, without a fault; `logged`: also what is logged."""
        if self.gpte_invalid(sp, i, gpte):
            return False
        gfn = self.gpte_gfn(gpte)
        access = self.clean(sp.role >> ACC & 7 & self.gpte_access(gpte), gpte)
        if not self.prefetchable(gfn, access & W_ and not logged):
            return False
        self.set_spte(sp, i, access, gfn, None)
        return True

    def prefetch(self, sp, at):
        if sp.level > 1:
            return
        base = at & ~7
        if sp.direct:
            start = None
            for i in range(base, base + 9):
                if i == base + 8 or sp.spt[i] & MP or i == at:
                    if start is None:
                        continue
                    access = sp.role >> ACC & 7
                    slot = self.slot(self.index_gfn(sp, start))
                    if slot is None or slot is not self.slot(self.index_gfn(sp, i - 1)):
                        return
                    for k in range(start, i):
                        if not self.prefetchable(self.index_gfn(sp, k), access & W_):
                            if k == start:
                                return
                            break
                        self.set_spte(sp, k, access, self.index_gfn(sp, k), None)
                    start = None
                elif start is None:
                    start = i
            return
        gpa = self.table_gpa(sp)
        for i in range(base, base + 8):
            if i == at or sp.spt[i] & MP:
                continue
            if not self.prefetch_gpte(sp, i, self.read(gpa + i * sp.size, sp.size), False):
                break

    # Roots
    def free_root(self, sp, invalid):
        sp.roots -= 1
        if not sp.roots and sp.invalid:
            self.prepare_zap(sp, invalid)

    def free_roots(self, prev, current):
        invalid = []
        for i in prev:
            if self.prev[i][0] is not None:
                self.free_root(self.prev[i][0], invalid)
                self.prev[i] = (None, 0)
        if current:
            if self.root is not None:
                self.free_root(self.root, invalid)
            elif self.pae is not None:
                for sp in self.pae:
                    if sp is not None:
                        self.free_root(sp, invalid)
            self.root = self.pae = None
            self.pgd = 0
        self.commit(invalid)

    def alloc_root(self, gfn, quadrant, level):
        sp = self.get_page(gfn, self.root_role & ~0x6F | level | quadrant << QUAD)
        sp.roots += 1
        return sp

    def load_roots(self):
        self.make_available()
        if self.direct:
            self.pae = [self.alloc_root(i << 18, 0, 2) for i in range(4)]
            self.pgd = 0
        elif self.level >= 4:
            self.root = self.alloc_root(self.cr3 >> 12 & 0xFFFFFFFFFF, 0, 4)
            self.pgd = self.cr3
        else:
            pae = []
            for i in range(4):
                if self.level == 3:
                    e = self.pdptrs[i]
                    pae.append(self.alloc_root((e & 0xFFFFFFFFFF000) >> 12, 0, 2) if e & 1 else None)
                else:
                    pae.append(self.alloc_root(self.cr3 >> 12, i, 2))
            self.pae = pae
            self.pgd = self.cr3
        self.sync_roots()

    def enter(self):
        while True:
            if "obsolete" in self.requests:
                self.requests.discard("obsolete")
                prev = [i for i, (sp, _) in enumerate(self.prev) if sp is not None and sp.invalid]
                current = self.pae is not None or (self.root is not None and self.root.invalid)
                self.free_roots(prev, bool(current))
            if "sync" in self.requests:
                self.requests.discard("sync")
                self.sync_roots()
            if "flush" in self.requests:
                self.requests -= {"flush", "current"}
                self.own["tlb_flush"] += 1
            if "current" in self.requests:
                self.requests.discard("current")
                self.own["tlb_flush"] += 1
            if "guest" in self.requests:
                self.requests.discard("guest")
                self.own["tlb_flush"] += 1
                self.sync_roots()
                self.sync_prev_roots()
            if self.root is None and self.pae is None:
                self.load_roots()
            if not self.requests:
                return

    # Registers
    def set_registers(self, cr0, cr3, cr4, efer):
        """All at once, by the client."""
        self.cr0, self.cr3, self.cr4, self.efer = cr0, cr3, cr4, efer
        self.init_roles()

    def unload(self):
        self.free_roots(range(3), True)

    def reset(self):
        self.unload()
        self.init_roles()

    def load_pdptrs(self, cr3):
        new = [self.read((cr3 & 0xFFFFFFE0) + 8 * i, 8) for i in range(4)]
        rsv = 1 << 63 | bits(self.maxphyaddr, 62) | bits(5, 8) | 6
        if any(e & 1 and e & rsv for e in new):
            return False
        if new != self.pdptrs:
            self.free_roots((), True)
        self.pdptrs = new
        return True

    def set_cr3(self, value):
        skip = False
        if self.cr4 & PCIDE:
            skip = bool(value >> 63)
            value &= ~(1 << 63)
        pcid = value & 0xFFF if self.cr4 & PCIDE else 0
        pae = self.level == 3
        if not (value == self.cr3 and not pae):
            if self.efer & LMA and value >> self.maxphyaddr:
                raise GP
            if pae and not self.load_pdptrs(value):
                raise GP
            if value != self.cr3:
                self.new_pgd(value)
            self.cr3 = value
        if not skip:
            if (self.cr3 & 0xFFF if self.cr4 & PCIDE else 0) == pcid:
                self.requests |= {"sync", "current"}
            if self.cr4 & PCIDE:
                self.free_roots([i for i in range(3) if self.prev[i][1] & 0xFFF == pcid], False)

    def usable(self, sp, pgd, new):
        return sp is not None and (self.direct or pgd == new) and sp.role == self.root_role

    def new_pgd(self, new):
        if self.pae is not None:
            self.free_roots((), True)
        if self.root is not None:
            if not self.usable(self.root, self.pgd, new):
                for i in range(3):
                    cur = self.root, self.pgd
                    (self.root, self.pgd), self.prev[i] = self.prev[i], cur
                    if self.usable(self.root, self.pgd, new):
                        break
                else:
                    self.free_roots((), True)
                    return
        else:
            for i in range(3):
                if self.usable(*self.prev[i], new):
                    break
            else:
                return
            self.root, self.pgd = self.prev[i]
            del self.prev[i]
            self.prev.append((None, 0))
        self.clear_mmio()
        if not self.direct:
            self.root.flood = 0

    def set_cr0(self, value):
        value |= 0x10
        old = self.cr0
        if value & CR0_PG and not old & CR0_PG and self.efer & LME and not self.cr4 & PAE:
            raise GP
        if (
            value & CR0_PG
            and not self.efer & LME
            and self.cr4 & PAE
            and (value ^ old) & (CR0_PG | 1 << 29 | 1 << 30)
            and not self.load_pdptrs(self.cr3)
        ):
            raise GP
        self.cr0 = value
        self.efer &= ~LMA
        if value & CR0_PG and self.efer & LME:
            self.efer |= LMA
        if (value ^ old) & CR0_PG and not value & CR0_PG:
            self.requests.add("guest")
        if (value ^ old) & (CR0_PG | CR0_WP) and not (
            self.version >= 612 and value ^ old == CR0_WP and not value & CR0_PG
        ):
            self.reset()

    def set_cr4(self, value):
        old = self.cr4
        if (
            self.cr0 & CR0_PG
            and not self.efer & LMA
            and value & PAE
            and (value ^ old) & (PGE | PSE | PAE | SMEP)
            and not self.load_pdptrs(self.cr3)
        ):
            raise GP
        self.cr4 = value
        if (value ^ old) & (PSE | PAE | SMEP | SMAP):
            self.reset()
        if value & PCIDE and not old & PCIDE:
            self.unload()
        if (value ^ old) & PGE or (not value & PCIDE and old & PCIDE):
            self.requests.add("guest")
        elif (value ^ old) & PAE or (value & SMEP and not old & SMEP):
            self.requests.add("current")

    def set_efer(self, value):
        old = self.efer
        self.efer = value & ~LMA | old & LMA
        if (value ^ old) & (LME | NXE):
            self.reset()

    def path(self, va, root=None):
        """(sp, index) of each entry on the way of the shadow."""
        sp = root if root is not None else self.root if self.root is not None else self.pae[va >> 30 & 3]
        while sp is not None:
            i = va >> (3 + 9 * sp.level) & 511
            yield sp, i
            s = sp.spt[i]
            if not s & MP or sp.level == 1 or s & PS:
                return
            sp = sp.kids[i]

    def invlpg_root(self, va, root):
        self.clear_mmio(va)
        for sp, i in self.path(va, root):
            s = sp.spt[i]
            if sp.level == 1 or s & PS:
                if not sp.unsync:
                    break
                if self.version < 612:
                    self.zap_pte(sp, i)
                    if s & MP:
                        self.remote_flush()
                    self.prefetch_gpte(sp, i, self.read(self.table_gpa(sp) + i * sp.size, sp.size), True)
                elif s and self.sync_spte(sp, i):
                    self.remote_flush()
            if not sp.children:
                break

    def invalidate(self, va, everywhere):
        if self.level == 4 and not (va >> 47 == 0 or va >> 47 == 0x1FFFF):
            return
        if self.direct:
            return
        self.invlpg_root(va, None)
        if everywhere:
            for sp, _ in self.prev:
                if sp is not None:
                    self.invlpg_root(va, sp)

    def invlpg(self, va):
        self.invalidate(va, True)
        self.own["invlpg"] += 1

    # Devices
    def clear_mmio(self, va=None):
        if va is None or self.mmio[0] == va & ~4095:
            self.mmio = (0, *self.mmio[1:])

    def mmio_cached(self, va):
        if self.mmio[3] != self.generation:
            return False
        if self.direct:
            return self.mmio[1] and self.mmio[1] == va >> 12
        return self.mmio[0] and self.mmio[0] == va & ~4095

    # The fault
    def inject(self, va, code):
        if code & PF_P and not code & PF_R:
            self.invalidate(va, False)
        self.own["pf_guest"] += 1
        raise Fault(code)

    def page_fault(self, va, code):
        """FIXED, SPURIOUS, RETRY, EMULATE, DEVICE_ACCESS; Fault: injected."""
        if code & PF_R:
            if self.mmio_cached(va):
                return DEVICE_ACCESS
            *_, (sp, i) = self.path(va)
            if not sp.spt[i] & DEV:
                return RETRY
            current = sp.spt[i] >> 16 == self.generation
            self.event(19, 0, 0, int(current))
            if current:
                self.event(14, sp.gfns[i], sp.acc[i])
                self.mmio = (va & ~4095, sp.gfns[i], sp.acc[i], self.generation)
                return DEVICE_ACCESS
        self.own["pf_taken"] += 1
        r = self.direct_fault(va, code) if self.direct else self.paging_fault(va, code)
        if r is FIXED:
            self.own["pf_fixed"] += 1
        elif r is SPURIOUS:
            self.own["pf_spurious"] += 1
        elif r is EMULATE:
            self.own["pf_emulate"] += 1
            if self.mmio_cached(va):
                return DEVICE_ACCESS
        return r

    def stale(self):
        """Whether the roots were zapped meanwhile; of roots without a page of their own nobody knows."""
        return "obsolete" in self.requests if self.root is None else self.root.invalid

    def direct_fault(self, va, code):
        gfn = va >> 12
        if code & (PF_P | PF_W | PF_R) == PF_P | PF_W and self.tracked.get(gfn):
            return EMULATE
        changes = self.changes
        host_writable = self.fault_in(gfn, code & PF_W)
        if host_writable is None:
            return EMULATE
        if self.slot(gfn) is None:
            self.mmio = (va & ~4095, gfn, 6, self.generation)
        if self.stale() or changes != self.changes:
            return RETRY
        self.make_available()
        goal = self.goal(gfn, 2)
        sp = self.pae[va >> 30 & 3]
        while True:
            i = va >> (3 + 9 * sp.level) & 511
            base = gfn & ~((1 << 9 * (sp.level - 1)) - 1)
            if sp.level == goal:
                break
            if not (sp.spt[i] & MP and not sp.spt[i] & PS):
                self.link(sp, i, self.get_page(base, self.child_role(sp, i, True, 7)))
            sp = sp.kids[i]
        r = self.set_spte(sp, i, 7, base, bool(code & PF_W), host_writable)
        if r is not SPURIOUS:
            self.prefetch(sp, i)
        return r

    def child_role(self, sp, i, direct, access):
        role = sp.role & ~(0x7 << ACC | 1 << DIRECT | 0xF) | access << ACC | direct << DIRECT | sp.level - 1
        if role & 16:
            role = role & ~(3 << QUAD) | (i & 1) << QUAD
        return role

    def goal(self, gfn, most):
        """The level of the largest page that may map it, `most` at most."""
        slot = self.slot(gfn)
        if slot is None or slot.dirty is not None:
            return 1
        while most > 1 and (self.disallow.get((most, gfn >> 9 * (most - 1))) or slot.uneven(most, gfn)):
            most -= 1
        return min(most, self.host.level(gfn - slot.base + slot.frame))

    def paging_fault(self, va, code):
        try:
            w = self.walk(va, code & (PF_W | PF_U | PF_I))
        except Fault as f:
            self.inject(va, f.code)
        gfn = w.gfn
        write, user = bool(code & PF_W), bool(code & PF_U)
        if code & PF_P and write and not code & PF_R and self.tracked.get(gfn):
            for sp, _ in self.path(va):
                sp.flood = 0
            return EMULATE
        self_map = False
        if w.access & W_ or (not self.cr0 & CR0_WP and not user):
            mask = ~((1 << 9 * (w.level - 1)) - 1) if self.level != 2 or w.level == 1 else ~0x1FF
            for lv in range(w.level, w.max + 1):
                self_map |= not (gfn ^ w.table[lv]) & mask
        most = 1 if self_map and self.version < 612 else w.level
        changes = self.changes
        host_writable = self.fault_in(gfn, write)
        if host_writable is None:
            return EMULATE
        device = self.slot(gfn) is None
        if device:
            self.mmio = (va & ~4095, gfn, w.access & 6, self.generation)
        access = w.access
        if write and not access & W_ and not self.cr0 & CR0_WP and not user and not device:
            access = access & ~U_ | W_
            if self.cr4 & SMEP:
                access &= ~X_
        if self.stale() or changes != self.changes:
            return RETRY
        self.make_available()
        sp = self.root if self.root is not None else self.pae[va >> 30 & 3]
        while sp.level > w.level:
            i = va >> (3 + 9 * sp.level) & 511
            sp.flood = 0
            if not (sp.spt[i] & MP and not sp.spt[i] & PS):
                lv = sp.level - 1
                child = self.get_page(w.table[lv], self.child_role(sp, i, False, w.above[lv]))
                if child.children:
                    self.sync_children(child)
                self.link(sp, i, child)
            sp = sp.kids[i]
        goal = self.goal(gfn, most)
        while True:
            i = va >> (3 + 9 * sp.level) & 511
            sp.flood = 0
            base = gfn & ~((1 << 9 * (sp.level - 1)) - 1)
            if sp.level == goal:
                break
            s = sp.spt[i]
            if s & MP and not s & PS and sp.kids[i].role >> ACC & 7 != access:
                self.drop_parent(sp.kids[i], sp, i)
                self.remote_flush()
            if not (sp.spt[i] & MP and not sp.spt[i] & PS):
                self.link(sp, i, self.get_page(base, self.child_role(sp, i, True, access)))
            sp = sp.kids[i]
        r = self.set_spte(sp, i, access, base, write, host_writable)
        if r is not SPURIOUS:
            self.prefetch(sp, i)
        return r

    # Emulated stores
    def pte_write(self, gpa, n):
        if not self.indirect:
            return
        gfn = gpa >> 12
        if self.cr4 & PAE and n == 4:
            gpa &= ~7
            n = 8
        gentry = self.read(gpa, n) if n in (4, 8) else 0
        self.c["mmu_pte_write"] += 1
        flush, invalid = False, []
        for sp in self.of_gfn(gfn):
            off = gpa & 4095
            bad = False
            if not (not off & sp.size - 1 and n == 1):
                bad = (off ^ off + n - 1) & ~(sp.size - 1) or n < 4
            if not bad and sp.level > 1:
                sp.flood += 1
                bad = sp.flood >= 3
            if bad:
                self.prepare_zap(sp, invalid)
                self.c["mmu_flooded"] += 1
                continue
            count = 1
            if sp.size == 4:
                off <<= 1
                if sp.level == 2:
                    off = (off & ~7) << 1
                    count = 2
                if off >> 12 != sp.role >> QUAD & 3:
                    continue
                off &= 4095
            for i in range(off // 8, off // 8 + count):
                s = sp.spt[i]
                self.zap_pte(sp, i)
                if gentry and sp.level > 1:
                    self.c["mmu_pde_zapped"] += 1
                if s & MP:
                    flush = True
        self.flush_or_zap(invalid, flush)

    # The processor
    def access(self, va, access):
        """Error code of the exit, or None and A and D set: gpa."""
        path = list(self.path(va))
        if not path:
            return access, None
        sp, i = path[-1]
        s = sp.spt[i]
        if not s & MP:
            return (access | PF_R if s & DEV else access), None
        user = access & PF_U
        bad = (access & PF_W and not s & W) or (user and not s & U) or (access & PF_I and s & NX)
        if not user and s & U and not self.direct:
            bad = bad or (access & PF_I and self.cr4 & SMEP) or (not access & PF_I and self.cr4 & SMAP and not self.ac)
        if bad:
            return access | PF_P, None
        sp.spt[i] = s | A | (D if access & PF_W else 0)
        return None, (self.index_gfn(sp, i) << 12) + (va & (1 << 12 + 9 * (sp.level - 1)) - 1)

    # What the emulator and the driver of a replay need
    def emulation(self, rip, va, user, protected, marked):
        """An instruction is fetched for emulation. Whether it is to run again instead, the shadows of what `va` leads
        to being gone: after a store to a shadowed table (`protected`) by one not `marked` as an instruction that
        writes tables.
        """
        self.own["insn_emulation"] += 1
        again = self.retry == (rip, va)
        if self.version < 612 or (protected and not again):
            self.retry = (0, 0)
        self.translate(rip, PF_I | user, device=False)
        if not protected or marked or again:
            return False
        gpa = self.translate(va, PF_W | user, device=False)
        if self.unprotect(gpa >> 12) or self.version < 612:
            self.retry = rip, va
            return True
        return False

    def translate(self, va, access, device=True):
        """Where the emulator's access leads to; a #PF is injected. `device`: the last device access is remembered."""
        if (
            device
            and self.mmio[0]
            and self.mmio[0] == va & ~4095
            and self.mmio[3] == self.generation
            and (self.direct or not self.permission(self.mmio[2], access))
        ):
            return self.mmio[1] << 12 | va & 4095
        if self.direct:
            return va
        try:
            w = self.walk(va, access)
        except Fault as f:
            self.inject(va, f.code)
        return w.gfn << 12 | va & 4095

    def is_device(self, gpa, write=False):
        slot = self.slot(gpa >> 12)
        return slot is None or (write and slot.readonly)

    def store(self, gpa, value, n):
        self.write(gpa, value, n)
        self.mark_dirty(gpa >> 12)
        self.pte_write(gpa, n)

    def load(self, register, value):
        """A register load or INVLPG, which KVM emulates; GP."""
        self.own["insn_emulation"] += 1
        if register != "efer" and self.version < 612:
            self.retry = (0, 0)
        getattr(self, register if register == "invlpg" else "set_" + register)(value)
