"""Golden vectors of the shadow MMU of Linux 6.1 and later: what is in a file, and its words for what the engine has.

FORMAT.md beside the files says what the arrays mean.
"""

import json

import numpy as np

import shadowcore as sc

READ, WRITE, FETCH, CR3, CR0, CR4, EFER, INVLPG, ANDB, XCHG, INC, OR, ADD, MODE, POKE = range(15)
LOG, GETLOG, CLEARLOG, SLOT, DISCARD, HREAD, COLLAPSE = 32, 34, 35, 36, 37, 38, 40
CMPXCHG8B, CMPXCHG16B, CMPXCHG, MOVQ_XMM, MOVLPS, MOVQ_MM, MOVUPS, MOVDQA, MOVAPS, MOVNTDQ = range(15, 25)
COMPARE = (CMPXCHG8B, CMPXCHG16B, CMPXCHG)
RMW = {ANDB: sc.Op.AND, XCHG: sc.Op.XCHG, INC: sc.Op.ADD, OR: sc.Op.OR, ADD: sc.Op.ADD} | dict.fromkeys(
    COMPARE, sc.Op.CMPXCHG
)
# Stores that KVM's decoder does not mark as those of page tables, and the size does not tell.
UNMARKED = (MOVQ_XMM, MOVLPS, MOVQ_MM)
OPS = np.dtype([*sc.OP_DTYPE.descr, ("value_high", "<u8"), ("expected", "<u8"), ("expected_high", "<u8")])
WORD = (1 << 64) - 1
REGISTERS = {CR3: sc.Op.CR3, CR0: sc.Op.CR0, CR4: sc.Op.CR4, EFER: sc.Op.EFER}
OK, PF, GP, MMIO, RETRY = 0, 1, 2, 3, 5
STACK = 0xC02  # the frame of exception frames, whose contents the vectors do not tell
ANY = -1  # target of an entry
READ_ONLY = 1 << 52  # beside an entry: the host's page, or the slot, may only be read
KINDS = dict(
    zip(
        (
            "accessed",
            "dirty",
            "made",
            "found",
            "synced",
            "unsync",
            "zapped",
            "leaf",
            "device",
            "device_hit",
            "all_zapped",
            "device_checked",
        ),
        (*range(5, 15), 18, 19),
        strict=True,
    )
)
EEXIST, EINVAL, REFUSED = 17, 22, 9
OWN = 3
PRESENT = 2  # in backing_arrays, of a frame: from this number on the host has a page
START = 65535  # the checkpoint before the first operation
FEATURES = sc.Features(maxphyaddr=40, la57=False, pku=False, pcid=False)


def kvm_role(role: int) -> int:
    """A role of the engine in the bits of KVM's."""
    glevels, level, quadrant = role & 15, role >> 4 & 15, role >> 8 & 3
    return (
        level
        | (glevels == 2) << 4
        | quadrant << 5
        | (role >> 10 & 1) << 7
        | (role >> 11 & 7) << 8
        | (role >> 25 & 1) << 11
        | 1 << 12
        | (1 - (role >> 16 & 1)) << 13
        | (role >> 23 & 1) << 14
        | (role >> 24 & 1) << 15
    )


def kvm_bits(value: int, level: int) -> int:
    """An entry of a shadow page in the bits of FORMAT.md, section 8."""
    guest = value >> 9 & 6  # rights that a device entry keeps
    if not value & 1:
        generation = (value >> 52 & 0x7FF) + 2
        shown = sum((generation >> bit & 1) << at for bit, at in ((2, 4), (3, 5), (4, 6), (5, 10), (6, 7), (7, 8)))
        return 0x8001 | guest | shown if value else 0
    bits = value & 7 | (value >> 63) << 3 | (value >> 5 & 1) << 4 | (value >> 6 & 1) << 5 | 1 << 9
    if level == 1 or value & 0x80:
        bits |= (value >> 7 & (level > 1)) << 6 | (not value & READ_ONLY) << 7 | (value >> 9 & 1) << 8
    return bits


def alike(made, wanted):
    """Two entries are the same, as far as both are known: the vectors name one frame for all zero pages."""
    return (
        made[0] == wanted[0] and made[1] in (ANY, wanted[1]) and (made[2] in (255, wanted[2] & 7) or wanted[2] == 255)
    )


def kvm_rights(value: int) -> int:
    return (value >> 9 & 6) | (1 - (value >> 63))


# What a file that only says how it differs takes from the one it differs from.
GIVEN = (
    "mode",
    "nframes",
    "nr_mmu_pages",
    "mem_gfn",
    "mem_page",
    "ops",
    "switch_op",
    "ckpt_op",
    "res",
    "acc_count",
    "acc",
    "mem",
)


# Operations that are not the guest's.
NO_ACCESS = (MODE, POKE, LOG, GETLOG, CLEARLOG, SLOT, DISCARD, HREAD, COLLAPSE)


def inserted(ops, at, new):
    """`ops` with `new` among them, at these places of the result."""
    out = np.empty(len(ops) + len(new), ops.dtype)
    old = np.ones(len(out), bool)
    old[at] = False
    out[old], out[at] = ops, new
    return out


def load(path, base=None):
    """The arrays of a file; base: the file that it differs from."""
    with np.load(path) as z:
        own = {key: z[key] for key in z.files}
    if base is None:
        return own
    with np.load(base) as z:
        given = {key: z[key] for key in GIVEN if key in z.files}
    if "ins" in own:
        given["ops"] = inserted(given["ops"], own["ins_at"], own["ins"])
    return given | own


def stream(path):
    """The arrays of a stream of tests/data, of a file that tells only differences with what it leaves out; the release
    that they are of."""
    base = None
    if path.parent.name == "kvm-6.12":
        base = path.parents[1] / "kvm-6.1" / path.name
    elif path.parent.name == "kvm-6.1-more":
        with np.load(path) as z:
            named = json.loads(str(z["info"])).get("base")
        base = named and path.parents[1] / "kvm-6.1" / f"{named}.npz"
    return load(path, base), "kvm-6.12" if path.parent.name == "kvm-6.12" else "kvm-6.1"


def slot_operation(vm, host, number, flags, gpa, size, offset):
    """KVM_SET_USER_MEMORY_REGION, of a row of `slots`. host: size of the host's pages where it keeps no account."""
    slots = vm.memory.slots
    if not size:
        vm.remove_slot(number)
    elif number < len(slots) and slots[number]:
        vm.set_slot(number, gpa=gpa, dirty_log=bool(flags & 1))
    else:
        vm.add_slot(
            gpa, size, slot=number, offset=offset, dirty_log=bool(flags & 1), read_only=bool(flags & 2),
            host_page_size=4096 if vm.memory.backing_arrays() else host,
        )  # fmt: skip
