"""A 32-bit guest whose tables, stacks and code lie each in a page of its own, any of which may be a user page."""

import struct

import shadowcore as sc
from shadowcore import unicorn as su

FEATURES = sc.Features(maxphyaddr=40, pku=False, pcid=False)
PAGES = {"idt": 0x6000, "gdt": 0x5000, "tss": 0x7000, "stack": 0x8000, "ldt": 0xA000}
FRESH, OTHER = 0xB000, 0xC000  # supervisor pages that nothing has touched
USER_CODE, USER_STACK = 0x400000, 0x402000
GATE_TARGET = 0x2200
SMAP = 1 << 21
PHASE = bytes.fromhex("e6f4 eb00")  # to the port; the jump ends the block of code, all of which Unicorn would run
# What the port gets from the handler of #UD, behind the call gate, from the handler of #PF, which adds the error code.
HANDLED, CALLED, FAULTED = 0x55, 0x56, 0x100


def descriptor(base=0, limit=0xFFFFF, kind=0x92, flags=0xC):
    """8 bytes of the GDT or LDT; kind: access byte."""
    low = (limit & 0xFFFF) | (base & 0xFFFFFF) << 16 | kind << 40
    return struct.pack("<Q", low | (limit >> 16 & 15) << 48 | flags << 52 | (base >> 24) << 56)


def gate(target):
    return struct.pack("<HHHH", target & 0xFFFF, 8, 0x8E00 | 3 << 13, target >> 16)


def load_flags(value):
    """push value; popf"""
    return b"\x68" + struct.pack("<I", value) + b"\x9d"


def start(code, mmu, way, *, cpl=0, user_pages=(), smap=True, iopl=3, **settings):
    """A machine that runs `code` at `cpl`, with all other flags clear, and with SMAP from then on.

    user_pages: names of PAGES that user code may use as well.
    """
    vm = sc.VM("16MiB", mmu, features=FEATURES)
    tables = sc.PageTables(vm.memory, mode="32", allocate=range(256, 512))
    for page in range(0, 0x10000, 0x1000):
        tables.map(page, page, 0x1000, "rwxu" if page in [PAGES[name] for name in user_pages] else "rwx")
    tables.map(USER_CODE, 0x20000, 0x4000, "rwxu")
    table = bytes(8)
    for kind in (0x9A, 0x92, 0xFA, 0xF2):  # 8, 0x10: supervisor code, data; 0x18, 0x20: user code, data
        table += descriptor(kind=kind, flags=0xC)
    table += descriptor(PAGES["tss"], 0x2087, 0x89, 0) + descriptor(PAGES["ldt"], 0x1F, 0x82, 0)
    table += descriptor(kind=0xF2)  # 0x38: not accessed so far
    table += gate(GATE_TARGET)[:5] + b"\xec" + gate(GATE_TARGET)[6:]  # 0x40: call gate to supervisor code
    vm.write_physical(PAGES["gdt"], table)
    vm.write_physical(PAGES["ldt"], descriptor(kind=0xF2) * 4)
    vm.write_physical(PAGES["tss"], struct.pack("<III", 0, PAGES["stack"] + 0x1000, 0x10))
    vm.write_physical(PAGES["tss"] + 0x66, struct.pack("<H", 0x68))
    vm.write_physical(PAGES["idt"] + 8 * 6, gate(0x2000))
    vm.write_physical(PAGES["idt"] + 8 * 14, gate(0x2100))
    vm.write_physical(0x2000, bytes.fromhex("b055 e6f4 f4"))
    vm.write_physical(0x2100, bytes.fromhex("58 0500010000 e7f4 f4"))  # pop eax; add eax, 0x100; out 0xf4, eax
    vm.write_physical(GATE_TARGET, bytes.fromhex("b056 e6f4 f4"))
    vm.write_physical(0x1F00, struct.pack("<HI", len(table) - 1, PAGES["gdt"]))
    vm.write_physical(0x1F08, struct.pack("<HI", 0x7F, PAGES["idt"]))
    boot = b""
    for register, load in (("cr4", "0f22e0"), ("cr3", "0f22d8"), ("cr0", "0f22c0")):
        boot += b"\xb8" + struct.pack("<I", tables.registers[register]) + bytes.fromhex(load)
    boot += bytes.fromhex("0f0115001f0000 0f011d081f0000")  # lgdt [0x1f00]; lidt [0x1f08]
    boot += b"\xea" + struct.pack("<IH", 0x1000 + len(boot) + 7, 8)
    boot += bytes.fromhex("66b81000 8ed0 8ed8 8ec0 66b82800 0f00d8 66b83000 0f00d0")  # ss, ds, es, tr, ldtr
    boot += b"\xbc" + struct.pack("<I", PAGES["stack"] + 0x1000)
    if cpl:
        boot += bytes.fromhex("66b82300 8ed8 8ec0")
        for word in (0x23, USER_STACK, 2 | iopl << 12, 0x1B, USER_CODE):
            boot += b"\x68" + struct.pack("<I", word)
        boot += b"\xcf"
        vm.write_physical(0x20000, PHASE + code)
    else:
        boot += PHASE + code
    vm.write_physical(0x1000, boot)
    machine = su.Machine(vm, way, **settings)
    machine.start(0x1000, rsp=PAGES["stack"] + 0x1000)
    assert machine.run(seconds=10) is not None
    machine.exit_code = None
    if smap:
        machine.cpu.cr4 |= SMAP
    return machine


def outcome(machine):
    """What the guest sent to the port, or "triple fault"."""
    try:
        return machine.run(seconds=10)
    except su.TripleFault:
        return "triple fault"
