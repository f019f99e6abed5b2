"""Files that people take for recordings and traces: what they are, and what to do with them."""

from __future__ import annotations

import re

import numpy as np

_TRACEPOINT = re.compile(rb"^.{0,80}\]\s.{0,60}: kvm(mmu)?_\w+: ", re.M)


def stranger(head: bytes) -> str:
    """What a file that begins with these bytes is, if no importer takes it, in words; "": nothing that is known."""
    for mark, what in _MARKS:
        if head.startswith(mark):
            return what
    if _raw_drmemtrace(head):
        return "a raw trace of drmemtrace: drrun -t drmemtrace -indir DIR makes DIR/trace/*.zip of it, which are read"
    if _TRACEPOINT.search(head):
        return "trace events of KVM, which have no accesses: shadowcore check --trace FILE counts them"
    if b"VM-EXIT" in head and b"Samples" in head:
        return "a table of perf kvm stat: shadowcore check --trace FILE takes it"
    if re.match(rb"==\d+== (Memcheck|Cachegrind|Callgrind|Massif|DHAT|Helgrind)", head):
        return "the text of another tool of Valgrind's: valgrind --tool=lackey --trace-mem=yes prints accesses"
    first = head.split(b"\n", 1)[0].lower()
    if b"addr" in first and b"kind" in first:
        return "text with columns that are not separated by commas, or have other names"
    if head and not head.strip(b"\0"):
        return "nothing but zeros"
    return ""


_MARKS = (
    (b"EMiL", "a memory image (LiME), no trace: shadowcore walk reads it"),
    (b"KDUMP   ", "a memory image (kdump-compressed), no trace: shadowcore walk says what to do"),
    (b"\x7fELF", "an ELF file, a program or a memory image, no trace: shadowcore walk reads memory images"),
    (b"PERFILE2", "data of perf: perf script, or perf kvm stat report, prints what is in it"),
    (b"\x17\x08\x44tracing", "data of trace-cmd: trace-cmd report prints what is in it"),
    (b"\x93NUMPY", "one array: .npz recordings of guests are archives of several"),
    (b"\xff\xfe", "text in UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16: save it as UTF-8"),
    (b"PK\x03\x04", "a zip archive of other contents: unpack it first"),
    (b"SQLite format 3\0", "a data base of SQLite"),
)


def _raw_drmemtrace(head: bytes) -> bool:
    """The first entry is a header: of 64 bits, the type (6, extended) and the kind of it (4 or 0) at the top."""
    if len(head) < 16:
        return False
    first = int(np.frombuffer(head, "<u8", 1)[0])
    return first >> 61 == 6 and first >> 56 & 31 in (0, 4) and 2 <= (first >> 48 & 0xFF or first & 0xFF) <= 16
