"""Golden vectors of Linux 6.1's nested paging, run on a machine of this project.

One file holds a stream under several configurations MMU.RAM; its operations are those of a file of kvm-6.1, or its own.
"""

import json
import pathlib
import zlib

import numpy as np
from kvm_files import (
    CLEARLOG,
    COLLAPSE,
    COMPARE,
    CR0,
    CR3,
    CR4,
    DISCARD,
    EFER,
    FEATURES,
    FETCH,
    GETLOG,
    GIVEN,
    HREAD,
    INC,
    INVLPG,
    LOG,
    MODE,
    NO_ACCESS,
    OPS,
    OWN,
    POKE,
    PRESENT,
    READ,
    REFUSED,
    REGISTERS,
    RMW,
    SLOT,
    STACK,
    START,
    WORD,
    WRITE,
    XCHG,
    inserted,
    load,
    slot_operation,
)

import shadowcore as sc
from shadowcore.engine.mmu import RECORDED

KINDS = {
    "made": 7, "found": 8, "zapped": 11, "leaf": 12, "device": 13, "device_hit": 14, "fast": 17, "all_zapped": 18,
    "device_checked": 19, "changed": 20, "split": 21,
}  # fmt: skip
OTHER_EXIT, WALK, EMULATED = 2, 3, 16
REGISTER_EXITS = {0x10: "cr0", 0x65: "cr0", 0x14: "cr4", 0x7C: "efer"}
EEXIST, EINVAL = 17, 22
OUTCOME_GP = 4
# The support pages: where the code of an operation lies, by its code and the logarithm of its size.
UNIT = 0x10


def kvm_role(role):
    level, direct = role >> 4 & 15, role >> 10 & 1
    return level | direct << 7 | (role >> 11 & 7) << 8 | (role >> 25 & 1) << 11 | 3 << 12


def leaf_bits(value, level, writable):
    """A leaf in the bits of FORMAT.md, section 8; writable: by the host's page and the slot."""
    bits = value & 7 | (value >> 63) << 3 | (value >> 5 & 1) << 4 | (value >> 6 & 1) << 5 | 1 << 9
    return bits | (value >> 7 & (level > 1)) << 6 | writable << 7 | (value >> 9 & 1) << 8


def link_bits(value):
    return value & 7 | (value >> 63) << 3 | (value >> 5 & 1) << 4 | (value >> 6 & 1) << 5 | 1 << 9


def changed_bits(flags, level):
    """Half of a "changed" event."""
    if flags >> 31:
        return 0x550
    if not flags:
        return 0
    if not flags & 1:
        generation = (flags >> 14 & 0x7FF) + 2
        shown = sum((generation >> bit & 1) << at for bit, at in ((2, 4), (3, 5), (4, 6), (5, 10), (6, 7), (7, 8)))
        return 1 | flags >> 9 & 6 | shown
    value = flags & 0xFFF | (flags >> 12 & 1) << 63
    if level > 1 and not value & 0x80:
        return link_bits(value)
    return leaf_bits(value, level, value >> 9 & 1)


def code_rows(code, user, size, faults):
    """The accesses of an operation of a 64-bit stream that has no `acc`: FORMAT.md, section 5."""
    units = {READ: 0, WRITE: 4, CR3: 8, CR0: 9, CR4: 10, EFER: 11, INVLPG: 12}
    at = (0xC00000 if user else 0xC01000) + 16 * (units[code] + (size.bit_length() - 1 if code in (READ, WRITE) else 0))
    rows = [(2, 0, 1, 0, 0xC010E0)] if user else []
    rows.append((2, user, 1, 0, at))
    if code in (READ, WRITE):
        rows.append((int(code == WRITE), user, size, 1, 0))
    if not faults:
        return [*rows, (2, 0, 1, 0, 0xC010F0 if user else at + 2)]
    rows += [(0, 0, 4, 0, 0xC020E0), (0, 0, 4, 0, 0xC02400)]
    rows += [(0, 0, 8, 0, 0xC02504)] if user else []
    return [*rows, (1, 0, 8, 0, 0xC02FE8), (2, 0, 1, 0, 0xC014E0)]


def configurations(path):
    with np.load(path) as z:
        return sorted(json.loads(str(z["info"]))["configs"])


def streams(path, bases):
    """The arrays of a file, with those of the file of `bases` that it is based on."""
    with np.load(path) as z:
        own = {key: z[key] for key in z.files}
    info = json.loads(str(own["info"]))
    if info.get("base"):
        base = load(bases / pathlib.Path(info["base"]).name)
        own["len"] = len(base["ops"])
        ops = base["ops"]
        if "ins" in own:
            ops = inserted(ops, own["ins_at"], own["ins"])
        for key in GIVEN:
            if key in base:
                own.setdefault(key, base[key])
        own["ops"] = ops
    return own, info


class NestedReplay:
    """One configuration of a stream on one machine."""

    def __init__(self, path, configuration, bases, **settings):
        self.z, self.info = z, _ = streams(path, bases)
        self.name = configuration
        self.total = self.info["configs"][configuration]
        mmu, ram = configuration.split(".")
        self.tdp = mmu == "tdp"
        self.mode = str(z["mode"]) if "mode" in z else self.info["mode"]
        self.nframes = int(z["nframes"]) if "nframes" in z else self.info["nframes"]
        large, cold = ram.endswith("2M"), ram.startswith("cold")
        there = self.rows("backing", START)
        self.frames = max([self.nframes, *(first + n for _, first, n, _ in there)])
        if "slots" in z:
            self.frames = max(self.frames, int((z["slots"][:, 3] + z["slots"][:, 4]).max()) >> 12)
        self.host = "2MiB" if large else 4096
        slot = sc.MemorySlot(0, self.nframes * 4096, host_page_size=4096 if cold else self.host)
        if "nr_mmu_pages" in z and not self.tdp:
            settings.setdefault("pool_pages", int(z["nr_mmu_pages"]))
        design = sc.Nested.kvm_6_1("tdp" if self.tdp else "direct", quirks=sc.Quirk.ACCESSED_EARLY, **settings)
        self.vm = sc.VM(
            memory=self.frames * 4096, slots=[slot], mmu=design, features=FEATURES,
            backing="warm" if not cold else "thp" if large else "cold",
        )  # fmt: skip
        self.vm.memory.bytes.reshape(-1, 4096)[z["mem_gfn"]] = z["mem_page"]
        for _, first, n, _ in there if cold else ():
            self.vm.host_touch(first, n)
        self.cpu = self.vm.vcpus[0]
        self.booting = sc.VM(memory=self.vm.memory.bytes, mmu="native", features=FEATURES)
        self.op = np.zeros(1, OPS)
        self.ops = [tuple(int(x) for x in row) for row in z["ops"]]
        self.boot = int(self.total["boot_ops"])
        self.counters = [name for name in self.info["counters"] if hasattr(self.vm.stats, name)]
        self.counters = [name for name in self.counters if name != "remote_tlb_flush"]
        self.seen = dict.fromkeys(self.counters, 0)
        self.registers = dict.fromkeys(REGISTER_EXITS.values(), 0)
        self.checkpoints = {int(op): i for i, op in enumerate(z["ckpt_op"])}
        self.log_mode = self.info["stream"].split("_")[0]
        self.events = {}
        for key in ("ev", "npf", "cnt", "dlog", "res_diff"):
            rows = z.get(f"{configuration}.{key}", ())
            self.events[key] = {}
            for row in rows:
                self.events[key].setdefault(int(row["op"]), []).append(tuple(int(x) for x in row.tolist()[1:]))
        self.results()
        self.vm.mmu.record(1 << 20)

    def rows(self, key, checkpoint):
        given = self.z[f"{self.name}.{key}"]
        return given[given["ckpt"] == checkpoint].tolist()

    def results(self):
        """For each operation, what it came to and which accesses it makes."""
        z = self.z
        added = set(z["ins_at"].tolist()) if "ins_at" in z else set()
        kept = [k for k in range(len(self.ops)) if k not in added]
        self.wanted, self.accesses = {}, {}
        names = ("outcome", "err", "rval", "mmio")
        for k, row in zip(kept, z["res"], strict=True):
            self.wanted[k] = tuple(int(row[name]) for name in names)
        for row in z.get(f"{self.name}.res_diff", ()):
            if int(row["op"]) in self.wanted:
                self.wanted[int(row["op"])] = tuple(int(row[name]) for name in names)
        if "acc" in z:
            ends = np.cumsum(z["acc_count"].astype(int))
            for k, first, end in zip(kept, [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
                self.accesses[k] = [tuple(int(x) for x in row) for row in z["acc"][first:end]]
        else:
            for k, (code, user, size, *_) in enumerate(self.ops):
                if code not in NO_ACCESS:
                    self.accesses[k] = code_rows(code, user, size, self.wanted[k][0] == 1)

    def access(self, op, user, size, addr, value=0):
        self.op[0] = (op, user, size, addr, value & WORD, value >> 64, 0, 0)
        r = self.cpu.run(self.op)
        return int(r.outcome[0]), int(r.error_code[0]), int(r.value[0])

    def run(self, k):
        """Make operation k: (outcome, error code, value, device accesses), and the frames of a dirty log."""
        code, _, size, flags, addr, value = self.ops[k]
        if code in NO_ACCESS:
            return self.host_operation(code, addr, value)
        outcome = err = loaded = devices = 0
        self.access(int(sc.Op.AC), 0, 0, 0, flags & 1)
        rows = self.accesses[k]
        registers = code in REGISTERS or code == INVLPG
        i = 0
        while i < len(rows):
            kind, user, nbytes, main, at = rows[i]
            if registers and i == 1:
                registers = False
                if code == INVLPG:
                    self.access(int(sc.Op.INVLPG), 0, 0, addr)
                elif self.access(int(REGISTERS[code]), 0, 0, 0, value)[0] == 2:
                    outcome = OUTCOME_GP
            self.cpu.rip = at
            op, data = (READ, WRITE, FETCH)[kind], 0
            if main and kind == 1:
                op, data = RMW.get(code, sc.Op.WRITE), 1 if code == INC else value
            elif kind == 1:
                op = sc.Op.OR
            result, code_of_fault, got = self.access(int(op), user, nbytes, addr if main else at, data)
            if result == 1:
                outcome, err = 1, code_of_fault
            elif main and result == 3:
                outcome = 2
                devices += 1
                if code in (READ, XCHG):
                    loaded = (1 << 8 * size) - 1
            elif main and (code in (READ, XCHG) or code in COMPARE):
                loaded = got & (1 << 8 * size) - 1
            if main and result == 3:
                while i + 1 < len(rows) and rows[i + 1][3]:
                    i += 1
            i += 1
        return (outcome, err, loaded, devices), None

    def host_operation(self, code, addr, value):
        memory = self.vm.memory
        if code == POKE:
            self.vm.host_touch(addr >> 12)
            memory.bytes[addr : addr + 8] = np.frombuffer(value.to_bytes(8, "little"), np.uint8)
        elif code == LOG and value:
            memory.start_dirty_log(addr, initially_set=self.log_mode == "dirtyinit")
        elif code == LOG:
            memory.stop_dirty_log(addr)
        elif code == CLEARLOG:
            memory.clear_dirty_log(0, addr, value)
        elif code == GETLOG:
            dirty = np.flatnonzero(memory.dirty_log(addr)).tolist()
            if self.log_mode not in ("dirtyman", "dirtyinit"):
                memory.clear_dirty_log(addr)
            return None, dirty
        elif code == HREAD:
            self.vm.host_touch(addr >> 12, write=False)
        elif code == DISCARD:
            self.vm.host_unmap(addr, value, discard=True)
        elif code == COLLAPSE and self.wanted[self.number][0] == REFUSED:
            self.refused_collapse(addr, value)
        elif code == COLLAPSE:
            self.vm.host_collapse(addr, value)
        elif code == SLOT:
            try:
                slot_operation(self.vm, self.host, *(int(x) for x in self.z["slots"][addr]))
            except sc.ConfigError as error:
                return (REFUSED, EEXIST if "overlap" in str(error) else EINVAL, 0, 0), None
            return (0, 0, 0, 0), None
        return None, None

    def refused_collapse(self, first, n):
        """The host gave up, before or after it had taken away its mapping, as the file tells; all pages are there."""
        requests = self.info["counters"].index("remote_tlb_flush_requests")
        if any(counter == requests for counter, _ in self.events["cnt"].get(self.number, [])):
            kept = self.vm.memory.backing_arrays()
            there = [frame for frame in range(first, first + n) if not kept or kept[0][frame] >= PRESENT]
            self.vm.host_unmap(first, n)
            for frame in there:
                self.vm.host_touch(frame)

    def taken(self):
        """Exits and other events since the last call, in the vectors' form, and how often the emulator ran."""
        exits, events, emulated = [], [], 0
        for a, b, kind, c in self.vm.mmu.recorded().tolist():
            name = RECORDED[kind]
            if name == "exit":
                exits.append([a, b, 0, 0])
                continue
            if name == "emulated":
                exits[-1][2] = 4
                emulated += 1
                continue
            if name in ("made", "found", "zapped"):
                b = kvm_role(b)
            elif name == "leaf":
                b = leaf_bits(b, c, not b >> 52 & 1)
                exits[-1][3] += 1
            elif name == "split":
                b = leaf_bits(b, c, b >> 9 & 1)
            elif name == "changed":
                b = changed_bits(b & 0xFFFFFFFF, c) | changed_bits(b >> 32, c) << 16
            elif name == "device":
                c = 0
            elif name == "fast":
                b &= 0xFFFFFFFF
                if c != 3:
                    exits[-1][2] = 6
            events.append((KINDS[name], a, b, c))
        return [tuple(each) for each in exits], events, emulated

    def step(self, k):
        """Make operation k; what differs, as (field, made, expected)."""
        if k < self.boot:
            return self.boot_step(k)
        out = []
        self.number = k
        made, dirty = self.run(k)
        if made is not None and k in self.wanted and self.ops[k][0] != MODE and made != self.wanted[k]:
            out.append(("res", made, self.wanted[k]))
        exits, events, emulated = self.taken()
        wanted = self.events["npf"].get(k, [])
        if exits != wanted:
            out.append(("npf", exits, wanted))
        given = self.events["ev"].get(k, [])
        wanted = [event for event in given if event[0] in KINDS.values()]
        if events != wanted:
            pairs = enumerate(zip(events, wanted, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(events), len(wanted)))
            out.append(("ev", at, events[at : at + 3], wanted[at : at + 3], len(events), len(wanted)))
        now = self.vm.stats.exits
        loads = {name: now[name] - self.registers[name] for name in self.registers}
        self.registers = {name: now[name] for name in self.registers}
        wanted = dict.fromkeys(loads, 0)
        for kind, _, code, _ in given:
            if kind == OTHER_EXIT:
                wanted[REGISTER_EXITS[code]] += 1
        if loads != wanted:
            out.append(("exits", loads, wanted))
        kinds = [event[0] for event in given]
        if emulated + sum(loads.values()) != kinds.count(EMULATED) or kinds.count(WALK) != kinds.count(EMULATED):
            out.append(("emulated", emulated, sum(loads.values()), kinds.count(EMULATED), kinds.count(WALK)))
        if dirty is not None:
            wanted = [frame for first, n in self.events["dlog"].get(k, []) for frame in range(first, first + n)]
            if dirty != wanted:
                out.append(("dirty", sorted(set(dirty) - set(wanted))[:20], sorted(set(wanted) - set(dirty))[:20]))
        out += self.counted(k)
        if k in self.checkpoints:
            out += self.check(self.checkpoints[k])
        return out

    def boot_step(self, k):
        """The client makes this operation, while the guest has not run yet: registers are put in place."""
        code, _, size, _, addr, value = self.ops[k]
        if code in REGISTERS:
            self.op[0] = (int(REGISTERS[code]), 0, 0, 0, value, 0, 0, 0)
            self.booting.vcpus[0].run(self.op)
            made = self.booting.vcpus[0].export_state()
            names = ("cr0", "cr3", "cr4", "efer", "pdptes")
            self.cpu.import_state(self.cpu.export_state() | {name: made[name] for name in names})
        elif code == WRITE:
            self.vm.host_touch(addr >> 12)
            self.vm.memory.bytes[addr : addr + size] = np.frombuffer(value.to_bytes(8, "little")[:size], np.uint8)
        else:
            assert code in (MODE, READ, FETCH, INVLPG), code
        return []

    def counted(self, k):
        wanted = {self.info["counters"][counter]: change for counter, change in self.events["cnt"].get(k, [])}
        now = {name: getattr(self.vm.stats, name) for name in self.counters}
        # KVM counts what exits; faults of the guest and INVLPG do not.
        now |= {"pf_guest": self.vm.stats.exits["guest"], "invlpg": self.vm.stats.exits["invlpg"]}
        differ = {}
        for name in self.counters:
            grown = now[name] - self.seen[name]
            if grown != wanted.get(name, 0):
                differ[name] = grown, wanted.get(name, 0)
        self.seen = now
        return [("cnt", differ, None)] if differ else []

    def tree(self):
        """The host's tables, from the root: leaves and device entries {(level, gfn): (bits, frame)}, tables."""
        mmu, leaves, tables = self.vm.mmu, {}, []
        (root, *_) = mmu.roots(0)
        kept = self.vm.memory.backing_arrays()
        firsts = [
            (self.vm.memory.frame(slot.gpa >> 12), int(slot.size) >> 12)
            for slot in self.vm.memory.slots if slot and slot.read_only
        ]  # fmt: skip
        todo = [] if root is None else [(root, 4, 0)]
        while todo:
            page, level, base = todo.pop()
            table = mmu.table(page)
            for index in np.flatnonzero(table).tolist():
                value, gfn = int(table[index]), base + (index << 9 * (level - 1))
                frame = (value & 0xFFFFFFFFFF000) >> 12
                if not value & 1:
                    generation = (value >> 52 & 0x7FF) + 2
                    places = ((2, 4), (3, 5), (4, 6), (5, 10), (6, 7), (7, 8))
                    shown = sum((generation >> bit & 1) << at for bit, at in places)
                    leaves[level, gfn] = 0x8001 | value >> 9 & 6 | shown, 0xFFFFFFFF
                elif level == 1 or value & 0x80:
                    frame -= 1 << 18
                    rom = any(first <= frame < first + n for first, n in firsts)
                    writable = not rom and (not kept or int(kept[0][frame]) == OWN)
                    leaves[level, gfn] = leaf_bits(value, level, writable), frame if writable else None
                else:
                    tables.append((level - 1, gfn, link_bits(value)))
                    todo.append((frame - 256, level - 1, gfn))
        return leaves, tables

    def check(self, c):
        out = []
        leaves, tables = self.tree()
        wanted = {}
        for _, level, bits, gfn, n, frame in self.rows("map", c):
            size = 1 << 9 * (level - 1)
            for i in range(n):
                wanted[level, gfn + i * size] = bits, frame if bits & 0x8000 else frame + i * size
        differ = [
            (key, leaves.get(key), wanted.get(key))
            for key in sorted(leaves.keys() | wanted.keys())
            if key not in leaves or key not in wanted or leaves[key][0] != wanted[key][0]
            or leaves[key][1] not in (None, wanted[key][1])
        ]  # fmt: skip
        if differ:
            out.append(("map", len(differ), differ[:4]))
        given = sorted(tuple(row[1:]) for row in self.rows("tables", c))
        if sorted(tables) != given:
            out.append(("tables", sorted(tables)[:5], given[:5]))
        ((_, _, used, role, _),) = self.rows("state", c)
        state = self.vm.mmu.export_state()
        made = 0 if self.tdp else state["n_active"] + state["n_dying"]
        if made != used or role != kvm_role(4 << 4 | 1 << 10 | 7 << 11):
            out.append(("state", made, used, hex(role)))
        runs = self.rows("backing", c)
        there = {frame for _, first, n, _ in runs for frame in range(first, first + n)}
        kept = self.vm.memory.backing_arrays()
        have = set(np.flatnonzero(kept[0] >= PRESENT).tolist()) if kept else set(range(self.frames))
        if have != there:
            out.append(("backing", sorted(have ^ there)[:10], None))
        return out + self.check_memory(c)

    def check_memory(self, c):
        if self.mode == "pae":
            return []  # the emulated processor sets bit 5 of root entries, which no real one does
        z = self.z
        wanted = {int(row["gfn"]): int(row["crc32"]) for row in z["mem"] if row["ckpt"] == c}
        wanted |= {int(row["gfn"]): int(row["crc32"]) for row in z.get(f"{self.name}.mem_diff", ()) if row["ckpt"] == c}
        memory = self.vm.memory.bytes.reshape(-1, 4096)
        made = {int(frame): zlib.crc32(memory[frame]) for frame in np.flatnonzero(memory.any(axis=1))}
        blank = zlib.crc32(bytes(4096))
        differ = [
            frame for frame in made.keys() | wanted.keys()
            if frame != STACK and made.get(frame, blank) != wanted.get(frame, blank)
        ]  # fmt: skip
        return [("mem", len(differ), sorted(differ)[:8])] if differ else []
