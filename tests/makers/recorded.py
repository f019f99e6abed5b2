"""Recordings read whole, and what guests begin with in those that tests write."""

import numpy as np

from shadowcore.recordings import GUEST, PROGRAM, STREAMS, Reader

REGISTERS = {"cr0": 0x80010011, "cr4": 0x20, "efer": 0xD01, "nframes": 64}


def guest(stream):
    return REGISTERS if stream == GUEST else None


def read(path, **options):
    """All of a recording: columns by name, and the rows of its events with `at` counted from its beginning."""
    with Reader(path, **options) as reader:
        blocks = list(reader)
        assert sum(block.records for block in blocks) == reader.records
        whole = {
            name: np.concatenate([block.columns[name] for block in blocks] or [np.zeros(0, code)])
            for name, code in STREAMS[reader.stream].items()
        }
        events = []
        for block in blocks if reader.stream == PROGRAM else ():
            events += [(block.first + row[0], *row[1:]) for row in block.events.tolist()]
        return whole, events, reader


def addresses(records):
    return np.random.default_rng(records).integers(0, 1 << 63, records, dtype=np.uint64)
