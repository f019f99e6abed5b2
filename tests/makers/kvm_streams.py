"""The processor of the golden vectors of Linux's shadow MMU, run on a machine of this project.

A vector's operation is a few accesses (FORMAT.md, section 5). That processor begins an instruction again from its fetch
after each exit, and reads before it writes where it does both; so do these replays, with vcpu.restarts.
"""

import json
import zlib

import numpy as np
from kvm_files import (
    ANY,
    CLEARLOG,
    CMPXCHG8B,
    CMPXCHG16B,
    COLLAPSE,
    COMPARE,
    DISCARD,
    EEXIST,
    EINVAL,
    FEATURES,
    FETCH,
    GETLOG,
    GP,
    HREAD,
    INC,
    INVLPG,
    KINDS,
    LOG,
    MMIO,
    MODE,
    NO_ACCESS,
    OPS,
    OWN,
    PF,
    POKE,
    PRESENT,
    READ,
    READ_ONLY,
    REFUSED,
    REGISTERS,
    RETRY,
    RMW,
    SLOT,
    STACK,
    START,
    UNMARKED,
    WORD,
    WRITE,
    XCHG,
    alike,
    kvm_bits,
    kvm_rights,
    kvm_role,
    slot_operation,
    stream,
)

import shadowcore as sc
from shadowcore.engine.mmu import RECORDED


def replay(path, **settings):
    """A stream of tests/data on its machine."""
    vector, release = stream(path)
    return Replay(vector, release, **settings)


class Replay:
    """One stream on one machine. `step` makes the next operation and compares it; `check` compares a checkpoint."""

    def __init__(self, vector, design="kvm-6.1", **settings):
        self.z = z = vector
        self.info = json.loads(str(z["info"]))
        self.nframes = int(z["nframes"])
        mmu = sc.config.design(design, pool_pages=int(z["nr_mmu_pages"]), **settings)
        large = bool(self.info.get("host_large_pages") or self.info["stream"].endswith("2M"))
        self.host = "2MiB" if large else 4096
        there = [] if "backing" not in z else z["backing"][z["backing"]["ckpt"] == START].tolist()
        self.frames = max([self.nframes, *(first + n for _, first, n, _ in there)])
        if "slots" in z:
            self.frames = max(self.frames, int((z["slots"][:, 3] + z["slots"][:, 4]).max()) >> 12)
        cold = bool(there) and sum(n for _, _, n, _ in there) < self.nframes
        backing = "warm" if not cold else "thp" if large else "cold"
        slot = sc.MemorySlot(0, self.nframes * 4096, host_page_size=4096 if cold else self.host)
        self.vm = sc.VM(
            memory=self.frames * 4096, slots=[slot], mmu=mmu, features=FEATURES, vcpus=1 + ("state_vcpu1" in z),
            backing=backing,
        )  # fmt: skip
        words = self.vm.memory.bytes.reshape(-1, 4096)
        words[z["mem_gfn"]] = z["mem_page"]
        for _, first, n, _ in there if cold else ():
            self.vm.host_touch(first, n)
        self.vm.mmu.record(1 << 16)
        for cpu in self.vm.vcpus:
            cpu.restarts = True
        self.cpu = self.vm.vcpus[0]
        self.op = np.zeros(1, OPS)
        self.wide = {
            int(k): tuple(int(x) for x in row) for k, row in zip(z.get("val2_op", ()), z.get("val2", ()), strict=True)
        }
        self.ops = [tuple(int(x) for x in row) for row in z["ops"]]
        self.rows = np.split(z["acc"], np.cumsum(z["acc_count"].astype(int))[:-1])
        self.faults = np.split(z["flt"], np.searchsorted(z["flt"]["op"], np.arange(1, len(self.ops))))
        self.expected = None
        if "ev_count" in z:
            ends = np.cumsum(z["ev_count"].astype(int))
            self.expected = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
        self.counters = [
            name
            for name in self.info["counters"]
            if (hasattr(self.vm.stats, name) and not name.startswith("remote_tlb_flush"))
            or name == "remote_tlb_flush_requests"
        ]
        self.log_mode = self.info["stream"].split("_")[0]
        self.dirty = None
        self.seen = dict.fromkeys(self.counters, 0)
        self.columns = {
            name: [i for i, each in enumerate(self.info["counters"]) if each.split(":")[-1] == name]
            for name in self.counters
        }
        self.checkpoints = {int(op): i for i, op in enumerate(z["ckpt_op"])}

    # One access
    def access(self, op, user, size, addr, value=0, expected=0):
        self.op[0] = (op, user, size, addr, value & WORD, value >> 64, expected & WORD, expected >> 64)
        r = self.cpu.run(self.op)
        return int(r.outcome[0]), int(r.error_code[0]), int(r.value[0]), int(r.emulated[0])

    def groups(self, rows):
        """The first access of each one's instruction: a fetch, or the first of an exception's delivery."""
        start, delivered, out = 0, False, []
        for i, (kind, _, _, main, _) in enumerate(rows):
            if kind == 2 or (delivered and kind == 0 and rows[i - 1][3]):
                start = i
            delivered = delivered or main
            out.append(start)
        return out

    def run(self, k):
        code, _, size, flags, addr, value = self.ops[k]
        expected = 0
        if k in self.wide:
            low, high, new, new_high = self.wide[k]
            half = 4 * size if code in (CMPXCHG8B, CMPXCHG16B) else 0
            expected, value = (
                (high << half | low, new_high << half | new) if code in COMPARE else (0, new_high << 64 | value)
            )
        self.cpu = self.vm.vcpus[flags >> 1 & 1]
        rows = [tuple(int(x) for x in row) for row in self.rows[k]]
        groups = self.groups(rows)
        self.outcome = self.err = self.value = self.devices = 0
        self.taken, self.log = [], []
        if code == POKE:
            self.vm.host_touch(addr >> 12)
            self.vm.memory.bytes[addr : addr + 8] = np.frombuffer(value.to_bytes(8, "little"), np.uint8)
        if code in (LOG, GETLOG, CLEARLOG):
            self.log_operation(code, addr, value)
            self.collect(None)
        if code in (SLOT, DISCARD, HREAD, COLLAPSE):
            self.host_operation(code, addr, value)
            self.collect(None)
        if code in NO_ACCESS:
            return
        self.access(sc.Op.AC, 0, 0, 0, flags & 1)
        i, registers = 0, code in REGISTERS or code == INVLPG
        while i < len(rows):
            kind, as_user, nbytes, main, at = rows[i]
            if registers and i == 1:
                registers = False
                if code == INVLPG:
                    self.access(sc.Op.INVLPG, 0, 0, addr)
                elif self.access(REGISTERS[code], 0, 0, 0, value)[0] == GP:
                    self.outcome = 4
                self.collect(None)
            self.cpu.rip = rows[groups[i]][4]
            self.cpu.odd_stores = bool(main) and code in UNMARKED
            va = addr if main else at
            op, data = (READ, WRITE, FETCH)[kind], 0
            if main and kind == 1:
                op, data = RMW.get(code, sc.Op.WRITE), 1 if code == INC else value
            elif kind == 1:
                op, data = sc.Op.OR, 0  # an exception's frame
            if main and kind == 1 and i + 1 < len(rows) and rows[i + 1][3] == 2:
                nbytes = size  # over the end of a page
            result, err, loaded, emulated = self.access(int(op), as_user, nbytes, va, data, expected if main else 0)
            self.collect((i, va, result, emulated))
            if result == RETRY:
                i = groups[i]
                continue
            if result == PF:
                self.outcome, self.err = 1, err
            elif main and result == MMIO:
                self.outcome = 2
                self.devices += 1
                if code in (READ, XCHG):
                    self.value = (1 << 8 * size) - 1
                if code in RMW:
                    self.device_store(i, as_user, va)
            elif main and (code in (READ, XCHG) or code in COMPARE):
                self.value = loaded & (1 << 8 * (size // 2 if code in (CMPXCHG8B, CMPXCHG16B) else size)) - 1
            if main and (emulated or result == MMIO or nbytes > rows[i][2]):
                while i + 1 < len(rows) and rows[i + 1][3]:
                    i += 1
            i += 1

    def log_operation(self, code, addr, value):
        memory = self.vm.memory
        if code == LOG and value:
            memory.start_dirty_log(addr, initially_set=self.log_mode == "dirtyinit")
        elif code == LOG:
            memory.stop_dirty_log(addr)
        elif code == CLEARLOG:
            memory.clear_dirty_log(0, addr, value)
        else:
            self.dirty = np.flatnonzero(memory.dirty_log(addr)).tolist()
            self.value = len(self.dirty)
            if self.log_mode not in ("dirtyman", "dirtyinit"):
                memory.clear_dirty_log(addr)

    def host_operation(self, code, addr, value):
        if code == HREAD:
            self.vm.host_touch(addr >> 12, write=False)
        elif code == DISCARD:
            self.vm.host_unmap(addr, value, discard=True)
        elif code == COLLAPSE:
            self.vm.host_collapse(addr, value)
        else:
            try:
                slot_operation(self.vm, self.host, *(int(x) for x in self.z["slots"][addr]))
            except sc.ConfigError as error:
                self.outcome, self.err = REFUSED, EEXIST if "overlap" in str(error) else EINVAL

    def device_store(self, i, user, va):
        """The store half of a read-modify-write of a device, by the emulator."""
        raise NotImplementedError

    def collect(self, access):
        events = self.vm.mmu.recorded().tolist()
        exits = [event for event in events if event[2] == RECORDED.index("exit")]
        for at, code, _, _ in exits:
            i, _, result, _ = access
            end = 2 if result == PF else 0
            if any(event[2] == RECORDED.index("emulated") for event in events):
                end = 3
                if any(event[2] in (RECORDED.index("device"), RECORDED.index("device_hit")) for event in events):
                    end = 4
            self.taken.append((i, code, end, at))
        for a, b, kind, c in events:
            name = RECORDED[kind]
            if name in ("exit", "emulated"):
                continue
            if name in ("made", "found", "synced", "unsync", "zapped"):
                b = kvm_role(b)
            elif name == "leaf":
                b = kvm_bits(b, c)
            elif name == "device":
                b |= 1
            self.log.append((KINDS[name], a, b, c))

    # Comparing
    def step(self, k):
        """Make operation k; what differs, as (field, made, expected)."""
        z = self.z
        self.run(k)
        out = []
        rows = self.rows[k]

        def place(i, code, end, at):
            """An exit, by what its access is: the vectors tell fetches of one page apart by guess."""
            main = bool(rows[i]["main"])
            return (int(rows[i]["kind"]), main and int(rows[i]["user"]), main, code, end, at if main else at >> 12)

        given = "addr" in z["flt"].dtype.names
        made = [place(*taken[:3], taken[3] if given else 0) for taken in self.taken]
        wanted = [
            place(int(f["access"]), int(f["err"]), int(f["end"]), int(f["addr"]) if given else 0)
            for f in self.faults[k]
        ]
        if made != wanted:
            out.append(("flt", made, wanted))
        first, last = self.expected[k] if self.expected else (0, 0)
        wanted = [
            (int(kind), int(a), int(b), int(c))
            for kind, a, b, c in zip(
                *(z.get(name, ())[first:last] for name in ("ev_kind", "ev_a", "ev_b", "ev_c")), strict=True
            )
            if kind in KINDS.values()
        ]
        if self.expected and self.log != wanted:
            out.append(("events", self.log, wanted))
        if self.dirty is not None:
            rows = z["dlog"][z["dlog"]["op"] == k]
            wanted = [frame for _, first, n in rows.tolist() for frame in range(first, first + n)]
            if self.dirty != wanted:
                out.append(("dirty", sorted(set(self.dirty) ^ set(wanted))[:20], None))
            self.dirty = None
        if self.ops[k][0] not in (MODE, POKE):
            res = z["res"][k]
            made = (self.outcome, self.err, self.value, self.devices)
            wanted = tuple(int(res[name]) for name in ("outcome", "err", "rval", "mmio"))
            if made != wanted:
                out.append(("res", made, wanted))
        now = {name: getattr(self.vm.stats, name) for name in self.counters}
        differ = {}
        for name in self.counters:
            wanted = sum(int(z["cnt"][k][column]) for column in self.columns[name])
            if now[name] - self.seen[name] != wanted:
                differ[name] = now[name] - self.seen[name], wanted
        self.seen = now
        if differ:
            out.append(("cnt", differ, None))
        if k in self.checkpoints and "pages" in z:
            out += self.check(self.checkpoints[k])
        return out

    def check(self, c):
        """Compare the shadow structure and memory at checkpoint c."""
        z, out = self.z, []
        mmu = self.vm.mmu
        headers = mmu.arrays["pages"]
        numbers = mmu.pages["page"].tolist()
        place = {page: i for i, page in enumerate(numbers)}
        place[None] = 65535
        wanted = z["pages"][z["pages"]["ckpt"] == c]
        fields = ("gfn", "role", "root_count", "unsync_children", "flood", "unsync")
        wanted = [tuple(int(page[name]) for name in fields) for page in wanted]
        made = []
        for page in numbers:
            h = headers[page]
            made.append(
                (
                    int(h["gfn"]),
                    kvm_role(int(h["role"])),
                    int(h["root_count"]),
                    int(h["unsync_children"]),
                    int(h["flood"]),
                    int(h["unsync"]),
                )
            )
        if made != wanted:
            return [
                (
                    "pages",
                    [(i, a, b) for i, (a, b) in enumerate(zip(made, wanted, strict=False)) if a != b][:3],
                    (len(made), len(wanted)),
                )
            ]
        entries = {}
        for i, page in enumerate(numbers):
            role = int(headers[page]["role"])
            level, direct = role >> 4 & 15, role >> 10 & 1
            table = mmu.table(page).tolist()
            for index, value in enumerate(table):
                if not value:
                    continue
                frame = (value & 0xFFFFFFFFFF000) >> 12
                rights = 255
                if not value & 1:
                    target = frame
                elif level == 1 or value & 0x80:
                    target = frame - (1 << 18)
                    if not self.may_write(target):
                        value |= READ_ONLY
                        target = ANY
                    rights = kvm_rights(value) if level == 1 and not direct else 255
                else:
                    target = place[frame - 256]
                entries[i, index] = (kvm_bits(value, level), target, rights)
        rows = z["sptes"][z["sptes"]["ckpt"] == c]
        wanted = {(int(r["page"]), int(r["index"])): (int(r["bits"]), int(r["target"]), int(r["acc"])) for r in rows}
        differ = [
            (key, entries.get(key), wanted.get(key))
            for key in sorted(entries.keys() | wanted.keys())
            if entries.get(key) != wanted.get(key)
            and not (key in entries and key in wanted and alike(entries[key], wanted[key]))
        ]
        if differ:
            out.append(("sptes", len(differ), differ[:4]))
        marks = mmu.unsync_marks()
        made = sorted((place[page], index) for page, index in marks.tolist() if page in place)
        wanted = sorted((int(page), int(index)) for at, page, index in z["unsync_bits"] if at == c)
        if made != wanted:
            out.append(("unsync_bits", made[:5], wanted[:5]))
        for cpu in self.vm.vcpus:
            state = z["state_vcpu1" if cpu.number else "state"][c]
            roots = mmu.roots(cpu.number)
            previous = tuple(65535 if root is None else place.get(root[1], 65534) for root in cpu.previous_roots)
            if cpu.mode == "64":
                made = (place.get(roots[0], 65534), (65535,) * 4, previous)
            else:
                made = (65534, tuple(place.get(root, 65534) for root in roots), previous)
            wanted = (int(state["root"]), *(tuple(state[name].tolist()) for name in ("pae_root", "prev_root")))
            if made != wanted:
                out.append(("roots", cpu.number, made, wanted))
        if mmu.export_state()["valid_gen"] != int(z["state"][c]["gen"]):
            out.append(("gen", mmu.export_state()["valid_gen"], int(z["state"][c]["gen"])))
        if "backing" in z:
            runs = z["backing"][z["backing"]["ckpt"] == c].tolist()
            wanted = {frame for _, first, n, _ in runs for frame in range(first, first + n)}
            kept = self.vm.memory.backing_arrays()
            made = set(np.flatnonzero(kept[0] >= PRESENT).tolist()) if kept else set(range(self.frames))
            if made != wanted:
                out.append(("backing", sorted(made ^ wanted)[:10], None))
        memory = self.vm.memory.bytes.reshape(-1, 4096)
        used = np.flatnonzero(memory.any(axis=1))
        made = {int(gfn): zlib.crc32(memory[gfn]) for gfn in used if gfn != STACK}
        wanted = {int(r["gfn"]): int(r["crc32"]) for r in z["mem"] if r["ckpt"] == c and r["gfn"] != STACK}
        if made != wanted:
            out.append(
                ("mem", sorted(g for g in made.keys() | wanted.keys() if made.get(g) != wanted.get(g))[:5], None)
            )
        return out

    def may_write(self, frame):
        """The host's page of a frame of RAM, and the slot that it is in, let stores pass."""
        kept, memory = self.vm.memory.backing_arrays(), self.vm.memory
        slots = [slot for slot in memory.slots if slot and slot.read_only]
        firsts = [(memory.frame(slot.gpa >> 12), int(slot.size) >> 12) for slot in slots]
        return not any(first <= frame < first + n for first, n in firsts) and (not kept or kept[0][frame] == OWN)

    def in_batches(self):
        """Run the stream as batches, without beginning instructions anew: (what differs at checkpoints, exits of each
        operation, those at device entries not counted)."""
        ops, owner, boundaries = [], [], []
        ac = None
        for k, (code, _, size, flags, addr, value) in enumerate(self.ops):
            rows = [tuple(row) for row in self.rows[k].tolist()] if code not in NO_ACCESS else []
            vcpu = flags >> 1 & 1
            if rows and ac != (flags & 1, vcpu):
                ac = flags & 1, vcpu
                ops.append((int(sc.Op.AC), 0, 0, 0, flags & 1, 0, 0, 0, vcpu))
                owner.append(k)
            for i, (kind, user, nbytes, main, at) in enumerate(rows):
                if i == 1 and (code in REGISTERS or code == INVLPG):
                    ops.append((int(REGISTERS.get(code, sc.Op.INVLPG)), 0, 0, addr, value, 0, 0, 0, vcpu))
                    owner.append(k)
                if main == 2:
                    continue
                op, data = (READ, WRITE, FETCH)[kind], 0
                high = expected = 0
                if main and kind == 1:
                    op, data = RMW.get(code, sc.Op.WRITE), 1 if code == INC else value
                    nbytes = size
                    if k in self.wide:
                        low, up, new, new_high = self.wide[k]
                        data, high = (new, new_high) if code in COMPARE else (value, new_high)
                        expected = low
                        if code == CMPXCHG8B:
                            data, expected = new_high << 32 | new, up << 32 | low
                        if code == CMPXCHG16B:
                            expected = low, up
                elif kind == 1:
                    op = sc.Op.OR
                low, up = expected if isinstance(expected, tuple) else (expected, 0)
                ops.append((int(op), user, nbytes, addr if main else at, data & WORD, high, low, up, vcpu))
                owner.append(k)
            if k in self.checkpoints or code in NO_ACCESS:
                boundaries.append((len(ops), k))
        table = np.array(ops, dtype=[*OPS.descr, ("vcpu", "u1")])
        for cpu in self.vm.vcpus:
            cpu.restarts = False
        exits, differ, done = np.zeros(len(self.ops), int), [], 0
        self.vm.mmu.record(0)
        for end, k in [*boundaries, (len(table), None)]:
            if end > done:
                result = self.vm.vcpus[0].run(table[done:end])
                exits += np.bincount(owner[done:end], result.exits, minlength=len(self.ops)).astype(int)
                done = end
            if k is not None and self.ops[k][0] in (LOG, GETLOG, CLEARLOG):
                self.log_operation(self.ops[k][0], *self.ops[k][4:6])
            if k is not None and self.ops[k][0] in (SLOT, DISCARD, HREAD, COLLAPSE):
                self.host_operation(self.ops[k][0], *self.ops[k][4:6])
            if k is not None and self.ops[k][0] == POKE:
                addr, value = self.ops[k][4:6]
                self.vm.host_touch(addr >> 12)
                self.vm.memory.bytes[addr : addr + 8] = np.frombuffer(value.to_bytes(8, "little"), np.uint8)
            if k in self.checkpoints:
                differ += [(k, *each) for each in self.check(self.checkpoints[k])] if "pages" in self.z else []
        return differ, exits.tolist()
