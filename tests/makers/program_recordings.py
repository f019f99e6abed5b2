"""Recordings of programs, made by hand and kept, and settings of the kernel that runs them."""

import numpy as np
from places import DATA

import shadowcore as sc
from shadowcore.recordings import Event, Reader, Writer

FAMILY, TRUE = DATA / "programs" / "family.screc", DATA / "programs" / "true.screc"
LACKEY = [DATA / "lackey" / "parent.txt", DATA / "lackey" / "child.txt"]
MODES = ("32", "pae", "64", "la57")
DESIGNS = ("native", "flush", "cached", "unsync", "adaptive", "nested", "agile")
EXACT = ("faults", "faults_zero", "faults_zero_page", "faults_file", "faults_copied", "faults_reused", "stack_growth",
         "forks", "execs", "exits")  # fmt: skip
PAGE = 4096
AT = 0x10000000  # where mappings are made
RW, ANON, SHARED = 3, 0x22, 0x21
EXACT_OPTIONS = {"fault_around": 1}


def options(mode="64", **more):
    return sc.KernelOptions(mode=mode, **more)


def made(path, steps, numbers=1, **more):
    """A recording by hand: accesses as (process, op, size, addresses), events as (Event, process, fields)."""
    with Writer(path, "program", **more) as writer:
        writer.processes.extend({"number": n} for n in range(numbers))
        running = None
        for step in steps:
            if isinstance(step[0], Event):
                kind, process, fields = step
                writer.event(kind, process, **fields)
            else:
                process, op, size, addr = step
                if process != running:
                    writer.event(Event.RUN, process)
                    running = process
                writer.write(op=np.full(len(addr), op), size=size, addr=np.array(addr, dtype=np.uint64))
    return path


def rows_of(path):
    """(process, op, size, addr), and events as (process, kind, fields), in order."""
    found = []
    with Reader(path) as reader:
        for part in (part for block in reader for part in block.segments()):
            if isinstance(part, tuple):
                process, *columns = part
                found += [(process, *row) for row in zip(*(c.tolist() for c in columns), strict=True)]
            else:
                fields = {n: int(part[n]) for n in part.dtype.names if part[n] and n not in ("at", "process", "kind")}
                if "file" in fields:
                    fields["file"] = reader.files[fields["file"] - 1]
                found.append((int(part["process"]), Event(part["kind"]), fields))
    return found
