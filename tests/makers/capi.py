"""The C interface by ctypes: the structures of shadowcore.h, read from that, and the table of functions."""

import ctypes
import re
from ctypes import POINTER, c_char_p, c_double, c_int, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path

import numpy as np

import shadowcore as sc

DATA = 0x40_0000
TABLES = 0x80_0000
DESIGNS = (
    "native",
    "flush",
    "cached",
    "kvm-2007",
    "unsync",
    "kvm-6.1",
    "kvm-6.12",
    "nested",
    "kvm-6.1-tdp",
    "kvm-6.1-direct",
    "agile",
    "adaptive",
)
"""By their numbers in the header."""
OK, PF, GP, MMIO = 0, 1, 2, 3

HEADER = Path(sc.get_include()) / "shadowcore.h"
TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text("utf-8"), flags=re.S)
TYPES = {"uint8_t": c_uint8, "uint16_t": c_uint16, "uint32_t": c_uint32, "uint64_t": c_uint64, "double": c_double}
TYPES["sc_vm"] = c_uint64


def constants():
    """Every enumerator and plain #define of a number."""
    found = {}
    for body in re.findall(r"enum \{(.*?)\};", TEXT, re.S):
        for name, value in re.findall(r"(SC_\w+) = ([^,}]+)", body):
            found[name] = eval(value)
    for name, value in re.findall(r"#define (SC_\w+) (0x[0-9A-F]+|\d+)u?\s*$", TEXT, re.M):
        found[name] = int(value, 0)
    return found


C = constants()


def structure(name):
    """The ctypes class of a structure of the header."""
    body = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", TEXT, re.S)[1]
    fields = []
    for line in filter(None, (line.strip() for line in body.split(";"))):
        kind, pointer, field, length = re.fullmatch(r"(?:const )?(\w+) (\*?)(\w+)(?:\[(\w+)\])?", line).groups()
        of = c_void_p if pointer else TYPES[kind]
        if length:
            of = of * (int(length) if length.isdigit() else C[length])
        fields.append((field, of))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


STRUCTS = ("sc_memory_slot", "sc_config", "sc_access", "sc_outcome", "sc_accesses", "sc_counters", "sc_event")
STRUCTS += ("sc_audit_result", "sc_prices", "sc_new_slot", "sc_reference")
MemorySlot, Config, Access, Outcome, Accesses, Counters, Event, AuditResult, Prices, NewSlot, Reference = map(
    structure, STRUCTS
)
LATER = ("sc_tables", "sc_mapping", "sc_entry", "sc_root", "sc_pool", "sc_shadow_page")
Tables, Mapping, Entry, Root, Pool, ShadowPage = map(structure, LATER)
STRUCTS += LATER
EVENT = ctypes.CFUNCTYPE(None, c_void_p, POINTER(Event))
REFERENCES = ctypes.CFUNCTYPE(None, c_void_p, POINTER(Reference), c_uint32)
PROTOTYPES = {
    "vm_create": (POINTER(Config), POINTER(c_uint64)),
    "vm_destroy": (c_uint64,),
    "register_read": (c_uint64, c_uint32, c_uint32, POINTER(c_uint64)),
    "register_load": (c_uint64, c_uint32, c_uint32, c_uint64),
    "invlpg": (c_uint64, c_uint32, c_uint64),
    "access": (c_uint64, POINTER(Access), POINTER(Outcome)),
    "translate": (c_uint64, POINTER(Access), POINTER(Outcome)),
    "access_many": (c_uint64, POINTER(Accesses)),
    "store": (c_uint64, c_uint64, c_char_p, c_uint64),
    "stored": (c_uint64, c_uint64, c_uint64),
    "host_address": (c_uint64, c_uint64, POINTER(c_void_p)),
    "counters": (c_uint64, POINTER(Counters)),
    "on_event": (c_uint64, c_uint32, EVENT, c_void_p),
    "audit": (c_uint64, POINTER(AuditResult)),
    "save": (c_uint64, c_char_p),
    "vm_load": (c_char_p, c_void_p, c_uint64, POINTER(c_uint64)),
    "last_error": (),
    "vm_adopt": (ctypes.py_object, POINTER(c_uint64)),
    "prices": (c_char_p, POINTER(Prices)),
    "set_prices": (c_uint64, POINTER(Prices)),
    "cycles": (c_uint64, POINTER(c_double)),
    "slot_add": (c_uint64, POINTER(NewSlot), POINTER(c_uint32)),
    "slot_remove": (c_uint64, c_uint32),
    "slot_move": (c_uint64, c_uint32, c_uint64),
    "host_unmap": (c_uint64, c_uint64, c_uint64, c_uint32),
    "host_touch": (c_uint64, c_uint64, c_uint64, c_uint32),
    "host_collapse": (c_uint64, c_uint64, c_uint64),
    "invpcid": (c_uint64, c_uint32, c_uint64, POINTER(c_uint64)),
    "vcpu_init": (c_uint64, c_uint32),
    "on_references": (c_uint64, REFERENCES, c_void_p),
    "prices_for": (c_uint64, c_char_p, POINTER(Prices)),
    "shadow_root": (c_uint64, c_uint32, POINTER(Root)),
    "shadow_pool": (c_uint64, POINTER(Pool)),
    "shadow_page": (c_uint64, c_uint32, POINTER(ShadowPage)),
    "tables_map": (c_uint64, POINTER(Tables), POINTER(Mapping)),
    "tables_unmap": (c_uint64, POINTER(Tables), c_uint64, c_uint64),
    "tables_protect": (c_uint64, POINTER(Tables), POINTER(Mapping)),
    "tables_entry": (c_uint64, POINTER(Tables), c_uint64, POINTER(Entry)),
    "tables_activate": (c_uint64, c_uint32, POINTER(Tables)),
}


class Table(ctypes.Structure):
    """sc_api."""

    _fields_ = (
        ("abi_version", c_uint32),
        ("struct_size", c_uint32),
        ("version", c_char_p),
        *(
            (name, ctypes.CFUNCTYPE(c_char_p if name == "last_error" else c_int, *arguments))
            for name, arguments in PROTOTYPES.items()
        ),
    )


API = Table.from_address(sc.embed.table_address())


def made(cls, **fields):
    """A structure with its size set."""
    new = cls(**fields)
    new.struct_size = ctypes.sizeof(cls)
    return new


def error():
    return API.last_error().decode()


class Guest:
    """A VM by the table of functions, beside the same one in Python, each over its own memory."""

    def __init__(self, design="cached", mode="64", size=8 << 20, start=True, pages=256, **config):
        self.memory = sc.embed.allocate(size)
        self.config = made(
            Config, design=DESIGNS.index(design), memory=self.memory.ctypes.data, memory_size=size, **config
        )
        self.vm = c_uint64()
        rc = API.vm_create(self.config, self.vm)
        assert rc == 0, error()
        settings = {"pool_pages": config["pool_pages"]} if "pool_pages" in config else {}
        self.twin = sc.VM(sc.embed.allocate(size), sc.config.design(design, **settings) if settings else design)
        self.cpu = self.twin.vcpus[0]
        self.tables = sc.PageTables(self.twin.memory, mode, allocate=range(16, 64))
        self.tables.map(DATA, 0x20_0000, pages * 4096, "rwxu")
        self.tables.map(TABLES, 16 * 4096, 48 * 4096, "rwx" if mode == "32" else "rw")
        self.memory[:] = self.twin.memory.bytes
        if start:
            for name, value in self.tables.registers.items():
                setattr(self.cpu, name, value)
                assert API.register_load(self.vm, 0, C[f"SC_{name.upper()}"], value) == 0

    def access(self, kind, gva, size=8, user=0, value=0, data=True, flags=0, expected=0, vcpu=0):
        outcome = made(Outcome)
        access = made(Access, gva=gva, kind=kind, size=size, user=user, flags=flags | bool(data), vcpu=vcpu)
        access.value[:] = [value & 2**64 - 1, value >> 64]
        access.expected[:] = [expected & 2**64 - 1, expected >> 64]
        rc = API.access(self.vm, access, outcome)
        assert rc < 0 or rc == outcome.outcome
        return rc, outcome

    def counters(self):
        counters = made(Counters)
        assert API.counters(self.vm, counters) == 0
        return np.frombuffer(counters, dtype="<u8")[1:]

    def audit(self):
        result = made(AuditResult)
        assert API.audit(self.vm, result) == 0
        return result

    def same(self):
        """Counters and memory are the twin's, and every invariant holds."""
        assert self.counters().tolist() == self.twin.stats.as_array().tolist()
        assert (self.memory == self.twin.memory.bytes).all()
        assert self.audit().violations == 0

    def close(self):
        assert API.vm_destroy(self.vm) == 0
