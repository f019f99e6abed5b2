"""Replays the golden vectors of the real KVM on a machine and compares every field.

    python replay.py [FOLDER | FOLDER/FILE ...]      kvm-6.1 without an argument

FILE may have wildcards. What a machine has to offer:

processor
    ac                              EFLAGS.AC of the guest
    select(n)                       the processor that the following calls mean
    enter()                         before the guest runs: requests are served, roots loaded
    access(va, access)              a walk of the processor: (None, gpa), or (error code of the exit, None)
    page_fault(va, code)            the exit: FIXED, SPURIOUS, RETRY, EMULATE, DEVICE_ACCESS; raises Fault (guest's #PF)
    load(register, value)           "cr0", "cr3", "cr4", "efer", "invlpg"; raises GP
emulator
    emulation(rip, va, user, protected, marked)   it begins: whether the instruction is to run again natively
    translate(va, access)           gpa; raises Fault
    is_device(gpa, write)
    store(gpa, value, n)            an emulated store
memory
    read(gpa, n), write(gpa, value, n)            as the processor has it
    page(frame)                     the bytes of a frame of the client
client
    poke(addr, value), peek(addr), discard(frame, n), collapse(frame, n)   in the client's own memory
    set_slot(number, flags, gpa, size, offset)    errno
    set_log(slot, on), get_log(slot), clear_log(slot, first, n)   offsets of frames; None if there is no log
books
    counters()                      by name, running totals; those of a second processor as "1:name"
    events                          a list of (kind, a, b, c) that the driver empties before each operation
    dump()                          the state as plain values, see `view`

Fields compared: results, exits, counters, events 5 to 14, 18 and 19, dirty logs; at checkpoints the page list, sptes,
unsync bits, roots of all processors, histogram of the reverse map, pages of the host, and memory.
"""

import glob
import json
import os
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from guest import CMPXCHG, COMPARE, Guest
from host import Host
from kvm61 import Mmu

VECTORS = str(Path(__file__).parents[2] / "data")
EVENTS = {*range(5, 15), 18, 19}
START = 65535  # the checkpoint before the first operation
NONE = 65535  # no root
UNKNOWN = 255  # rights beside an spte
MAPPED, HOST_WRITABLE = 1 << 9, 1 << 7  # of an spte
EXCEPTION_STACK = 0xC02  # what is on this frame depends on the harness
EMPTY = np.empty(0, "u1")
LOG_MODES = {"dirtyman": "manual", "dirtyinit": "initially set"}
STATE = ("gen", "used_pages", "indirect_pages", "root_role", "cpu_role", "pgd", "root", "prev_root", "pae_root")
PAGE = ("gfn", "role", "root_count", "unsync_children", "flood", "unsync", "gen")
# What a file that only says how it differs takes from the other one.
GIVEN = ("mode", "nframes", "nr_mmu_pages", "mem_gfn", "mem_page", "ops", "ckpt_op", "res", "acc_count", "acc", "mem")


class Op(NamedTuple):
    """One operation; `value` and `expected` (of a CMPXCHG) have the whole width of the access."""

    op: int
    user: int
    size: int
    flags: int
    addr: int
    value: int
    expected: int = 0


def widened(op, expected, expected_high, new, new_high):
    """An operation with the row of `val2` that goes with it."""
    if op.op in COMPARE:
        half = 4 * op.size if op.op != CMPXCHG else 0
        return op._replace(value=new_high << half | new, expected=expected_high << half | expected)
    return op._replace(value=new_high << 64 | op.value)


def rows_of(array, *names):
    """Rows of a structured array as tuples of plain integers."""
    return list(zip(*(array[n].tolist() for n in names or array.dtype.names), strict=True))


class Split:
    """Rows of consecutive operations: `rows[k]` are those of operation k."""

    def __init__(self, rows, counts):
        self.rows, self.ends = rows, np.cumsum(counts, dtype=np.int64).tolist()

    def __getitem__(self, k):
        return self.rows[self.ends[k - 1] if k else 0 : self.ends[k]]


def load(path):
    """The arrays of a file, with those of the file of `kvm-6.1` that it differs from."""
    with np.load(path) as z:
        own = {k: z[k] for k in z.files}
    folder, name = os.path.split(path)
    info = json.loads(str(own["info"]))
    base = info.get("base") or (name.removesuffix(".npz") if folder.endswith("kvm-6.12") else None)
    if base is None:
        return own
    with np.load(f"{VECTORS}/kvm-6.1/{base}.npz") as z:
        given = {k: z[k] for k in GIVEN}
    if "ins" in own:
        given["ops"] = inserted(given["ops"], own["ins_at"], own["ins"])
    return given | own


def inserted(ops, at, new):
    """`ops` with `new` among them, at these places of the result."""
    out = np.empty(len(ops) + len(new), ops.dtype)
    old = np.ones(len(out), bool)
    old[at] = False
    out[old], out[at] = ops, new
    return out


class Stream:
    """One file of vectors: operations, the accesses of each, and what the real KVM did."""

    def __init__(self, path):
        self.z = z = load(path)
        self.info = json.loads(str(z["info"]))
        self.version = 612 if self.info["kernel"].startswith("6.12") else 61
        self.nframes, self.limit = int(z["nframes"]), int(z["nr_mmu_pages"])
        self.ops = [Op(*row) for row in rows_of(z["ops"])]
        for k, words in zip(z.get("val2_op", EMPTY).tolist(), z.get("val2", EMPTY).tolist(), strict=True):
            self.ops[k] = widened(self.ops[k], *words)
        self.accesses = Split(rows_of(z["acc"]), z["acc_count"])
        self.slots = z.get("slots", EMPTY).tolist()
        backing = z.get("backing")
        self.present = None if backing is None else rows_of(backing[backing["ckpt"] == START], "frame", "n", "kind")
        ends = [frame + n for frame, n, _ in self.present or ()]
        self.frames = max(self.nframes, *ends, *(size + offset >> 12 for _, _, _, size, offset in self.slots), 0)
        self.results = rows_of(z["res"], "outcome", "err", "rval", "mmio")
        names = [n for n in ("access", "err", "end", "addr") if n in z["flt"].dtype.names]
        self.faults = Split(rows_of(z["flt"], *names), np.bincount(z["flt"]["op"], minlength=len(self.ops)))
        self.logs = {}
        for op, frame, n in rows_of(z["dlog"]) if "dlog" in z else ():
            self.logs.setdefault(op, []).extend(range(frame, frame + n))
        self.skipped = {EXCEPTION_STACK}
        self.expect()

    def expect(self):
        z = self.z
        self.counts = z["cnt"].tolist()
        self.checkpoints = {op: i for i, op in enumerate(z["ckpt_op"].tolist())}
        self.events = None
        if "ev_kind" in z:
            self.events = Split(rows_of(z, "ev_kind", "ev_a", "ev_b", "ev_c"), z["ev_count"])

    def ram(self):
        """The client's memory at the start."""
        ram = bytearray(self.frames << 12)
        for frame, page in zip(self.z["mem_gfn"].tolist(), self.z["mem_page"], strict=True):
            ram[frame << 12 : frame + 1 << 12] = page.tobytes()
        return ram

    def machine(self):
        self.host = Host(self.frames, bool(self.info.get("host_large_pages")), self.present)
        mode = next((mode for name, mode in LOG_MODES.items() if self.info["stream"].startswith(name)), "plain")
        vcpus = 1 + ("state_vcpu1" in self.z)
        return Mmu(self.ram(), self.nframes, self.limit, self.host, version=self.version, vcpus=vcpus, log_mode=mode)

    def at(self, c, table):
        """The rows of a table of checkpoint `c`."""
        rows = self.z[table]
        return rows[(rows["ckpt"] if rows.dtype.names else rows[:, 0]) == c]

    def compare(self, k, guest):
        """The problems of operation k: (what, got, wanted)."""
        out = []
        if self.faults:
            want = self.faults[k]
            known = fault_with_address if want and len(want[0]) == 4 else fault
            got, want = ([known(self.accesses[k], *f) for f in faults] for faults in (guest.faults, want))
            if got != want:
                out.append(("faults", got, want))
        if self.results:
            got = guest.outcome, guest.error, guest.loaded, guest.devices
            if got != self.results[k]:
                out.append(("result", got, self.results[k]))
            if guest.log != self.logs.get(k, []):
                out.append(("log", guest.log, self.logs.get(k, [])))
        if self.events:
            got = [e for e in guest.machine.events if e[0] in EVENTS]
            want = [e for e in self.events[k] if e[0] in EVENTS]
            if got != want:
                out.append(("events", *([tuple(map(hex, e)) for e in events] for events in (got, want))))
        return out

    def compare_state(self, c, machine):
        """The problems of checkpoint c."""
        out = self.compare_memory(c, machine)
        if "backing" in self.z:
            want = {frame + i for frame, n in rows_of(self.at(c, "backing"), "frame", "n") for i in range(n)}
            if self.host.present() != want:
                out.append(("host pages", sorted(self.host.present() - want), sorted(want - self.host.present())))
        if "state" not in self.z:
            return out
        dump = machine.dump()
        pages = rows_of(self.at(c, "pages"), *PAGE)
        if dump["pages"] != pages:
            return [*out, ("pages", dump["pages"], pages)]
        for table, state in zip(("state", "state_vcpu1"), dump["states"], strict=False):
            out += compare_roots(state, self.z[table][c])
        if c in self.z["sptes"]["ckpt"]:
            out += compare_sptes(dump["sptes"], self.at(c, "sptes"))
        want = sorted((page, i) for _, page, i in self.at(c, "unsync_bits").tolist())
        if dump["unsync_bits"] != want:
            out.append(("unsync_bits", dump["unsync_bits"], want))
        if "rmap_hist" in self.z and dump["rmap_hist"] != self.z["rmap_hist"][c].tolist():
            out.append(("rmap_hist", dump["rmap_hist"], self.z["rmap_hist"][c].tolist()))
        return out

    def compare_memory(self, c, machine):
        want = dict(rows_of(self.at(c, "mem"), "gfn", "crc32"))
        zero = bytes(4096)
        for frame in range(self.frames):
            page = machine.page(frame)
            if frame not in self.skipped and want.get(frame) != (None if page == zero else zlib.crc32(page)):
                return [("memory", hex(frame))]
        return []


def fault(accesses, i, code, end, va=None):
    """What a file without addresses knows for sure of a fault."""
    return (accesses[i][:4] if accesses[i][3] else accesses[i][0], code, end)


def fault_with_address(accesses, i, code, end, va):
    """The same, with the address; of accesses that are not the operation's own, kind and page only."""
    return (accesses[i][:4], code, end, va) if accesses[i][3] else (accesses[i][0], code, end, va >> 12)


def compare_roots(state, row):
    """The problems of one processor's roots."""
    out = []
    for name in STATE:
        want = row[name].tolist()
        if name == "cpu_role":
            want &= 0xFFFFFFFF
        if state[name] != (tuple(want) if isinstance(want, list) else want):
            out.append((name, state[name], want))
    for page, got, want in zip(state["prev_root"], state["prev_pgd"], row["prev_pgd"].tolist(), strict=True):
        if page != NONE and got != want:
            out.append(("prev_pgd", got, want))
    return out


def compare_sptes(got, rows):
    """The problems of all sptes of a checkpoint."""
    want = {row[:2]: row[2:] for row in rows_of(rows, "page", "index", "bits", "target", "acc")}
    keys = sorted(got.keys() | want.keys())
    return [("spte", key, got.get(key), want.get(key)) for key in keys if not alike(got.get(key), want.get(key))]


def alike(got, want):
    """Whether two sptes are the same; the rights beside one may be unknown; all zero pages are one to the file."""
    if None in (got, want):
        return False
    zero = got[0] & (MAPPED | HOST_WRITABLE) == MAPPED
    rights = got[2] in (None, want[2] & 7) or want[2] == UNKNOWN
    return got[0] == want[0] and (zero or got[1] == want[1]) and rights


def replay(stream, stop=True):
    """Runs a stream; the operations that differ, as (index, problems), only the first of them if `stop`."""
    machine = stream.machine()
    guest = Guest(machine, stream.slots)
    bad = []
    before = machine.counters()
    names = [(column, name) for column, name in enumerate(stream.info["counters"]) if name in before]
    for k, op in enumerate(stream.ops):
        machine.events = []
        guest.run(op, stream.accesses[k])
        problems = stream.compare(k, guest)
        after, row = machine.counters(), stream.counts[k]
        for column, name in names:
            if after[name] - before[name] != row[column]:
                problems.append((name, after[name] - before[name], row[column]))
        before = after
        if k in stream.checkpoints and not problems:
            problems = stream.compare_state(stream.checkpoints[k], machine)
        if problems:
            bad.append((k, problems))
            if stop:
                break
    return bad


def expanded(names):
    """Paths of FOLDER or FOLDER/FILE below the vectors."""
    for name in names:
        path = f"{VECTORS}/{name}"
        yield from sorted(glob.glob(path + ".npz") or glob.glob(path + "/*.npz"))


def main(names):
    for name in expanded(names or ["kvm-6.1"]):
        stream = Stream(name)
        bad = replay(stream)
        print(os.path.basename(name).removesuffix(".npz"), len(stream.ops), "differs" if bad else "exact", flush=True)
        for k, problems in bad:
            print("  op", k, stream.ops[k], stream.accesses[k])
            for problem in problems[:6]:
                print("     ", *problem)


if __name__ == "__main__":
    main(sys.argv[1:])
