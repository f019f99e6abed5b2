"""Counters, exits, operations and other lists stand in several files: every copy says the same, name by name and value
by value.

Read are texts alone, so that a list can be judged before anything is built. What can be made from another copy when it
is imported or compiled is made so, and stands nowhere else (counters.COUNTERS, config.FEATURES). CONTRIBUTING.md, "To
add to a list", says which lines an entry needs; below they are added, and left out one by one.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADER = "shadowcore/include/shadowcore.h"
ENGINE = "shadowcore/engine/"
GUEST = "shadowcore/guest/"


def tree():
    """The texts that lists are in, by path."""
    found = {}
    for pattern in ("shadowcore/**/*.py", "shadowcore/**/*.pyi", "shadowcore/**/*.pxd", "shadowcore/**/*.h"):
        found.update((path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in ROOT.glob(pattern))
    found.update((path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in ROOT.glob("pyx/**/*.pyx"))
    for name in ("docs/series.md", "CONTRIBUTING.md"):
        found[name] = (ROOT / name).read_text("utf-8")
    return found


@pytest.fixture(scope="module")
def texts():
    if not (ROOT / "pyx").is_dir():
        pytest.skip("the sources are not here")
    return tree()


def number(text, known=None):
    """The value of an expression of numbers and names."""
    return eval(compile(ast.parse(text.strip(), mode="eval"), text, "eval"), {"__builtins__": {}}, known or {})


# Readers: each gives a function of the texts that returns names, in lower case, and their values.


def engine(prefix, file, leave_out=()):
    """The enumerators PREFIX_NAME of a header, of the engine if no path is given. PREFIX_COUNT is their number."""

    def read(texts):
        found, known = {}, {}
        for name, value in re.findall(
            r"^    ([A-Z]\w+) = ([^#\n]+)", texts[file if "/" in file else ENGINE + file], re.M
        ):
            known[name] = number(value, known)
            if name.startswith(prefix) and name not in leave_out:
                found[name.removeprefix(prefix).lower()] = known[name]
        count = found.pop("count", None)
        return found if count in (None, len(found)) else found | {"count": count}

    return read


def header(prefix, first):
    """The enumerators of shadowcore.h in the block that has `first`."""

    def read(texts):
        for block in re.findall(r"enum \{(.*?)\};", re.sub(r"/\*.*?\*/", "", texts[HEADER], flags=re.S), re.S):
            found = dict(re.findall(r"(\w+) = ([^,}\n]+)", block))
            if first in found:
                chosen = ((name, value) for name, value in found.items() if name.startswith(prefix))
                return {name.removeprefix(prefix).lower(): number(value) for name, value in chosen}
        return {}

    return read


def members(file, name, leave_out=()):
    """The members of an enumeration of Python."""

    def read(texts):
        (cls,) = (n for n in ast.parse(texts[file]).body if isinstance(n, ast.ClassDef) and n.name == name)
        known = {n.targets[0].id: ast.unparse(n.value) for n in cls.body if isinstance(n, ast.Assign)}
        values = {}
        for each, text in known.items():
            values[each] = number(text, values)
        return {each.lower(): value for each, value in values.items() if each not in leave_out}

    return read


def sequence(file, name):
    """A tuple of texts in a Cython module: numbered in its order."""

    def read(texts):
        body = re.search(rf"^{name} = (\(.*?\))$", texts[file], re.M | re.S)[1]
        return {each.replace("-", "_"): place for place, each in enumerate(ast.literal_eval(body))}

    return read


def structure(file, head, field):
    """The fields of a structure, numbered in their order. field: what one looks like."""

    def read(texts):
        body = re.split(r"\n(?=\S)", texts[file][texts[file].index(head) :], maxsplit=1)[0]
        return {name: place for place, name in enumerate(re.findall(field, body, re.M))}

    return read


def features(texts):
    """The fields of config.Features: config.FEATURES, from which bits are made."""
    names = structure("shadowcore/config.py", "class Features:", r"^    (\w+): bool = ")(texts)
    return {name: 1 << place for name, place in names.items()}


def modifications(texts):
    """The operations of VCpu.modify."""
    body = re.search(r"_MODIFY = \{(.*?)\}", texts["pyx/engine/vcpu.pyx"], re.S)[1]
    codes = engine("OP_", "access.pxd")(texts)
    return {name: codes.get(code.lower()) for name, code in re.findall(r'"(\w+)": OP_(\w+)', body)}


def labels(texts):
    """The reasons of exits that reports have names for, in an order of their own."""
    body = re.search(r"^EXITS = (\{.*?^\})", texts["shadowcore/report/document.py"], re.M | re.S)[1]
    order = engine("EXIT_", "counters.pxd", NO_EXITS)(texts)
    return {name: order.get(name) for name in ast.literal_eval(body)}


def points_in_words(texts):
    """The audit points that the docstring of VM.audit_points names."""
    doc = re.search(r'"""(Points at which every invariant.*?)"""', texts[ENGINE + "machine.py"], re.S)[1]
    return {name.replace("-", "_"): place for place, name in enumerate(re.findall(r'"([\w-]+)"', doc))}


def quirks_in_words(texts):
    """The rows of the table in docs/series.md."""
    names = re.findall(r"^\| `([A-Z_0-9]+)` \|", texts["docs/series.md"], re.M)
    return {name.lower(): 1 << place for place, name in enumerate(names)}


def outcomes(texts):
    """The keys of results._OUTCOMES, whose names are words."""
    body = re.search(r"^_OUTCOMES = (\{.*?\})", texts["pyx/engine/results.pyx"], re.M | re.S)[1]
    return dict(zip(("ok", "pf", "gp", "mmio", "ud"), ast.literal_eval(body), strict=False))


def returned(texts):
    """What sc_api returns of an access, by the engine's names."""
    names = {"ok": "ok", "page_fault": "pf", "general_protection": "gp", "mmio": "mmio", "undefined": "ud"}
    return {names.get(name, name): value for name, value in header("SC_", "SC_OK")(texts).items() if value >= 0}


def rights(texts):
    """SC_RIGHT_*, by the engine's letters."""
    return {name[1:2] if name.startswith("ex") else name[:1]: bit for name, bit in RIGHTS(texts).items()}


def prices(texts):
    """The fields of sc_prices as the engine declares them."""
    body = re.search(r"struct sc_prices:\n(.*?)\n\n", texts[ENGINE + "prices.pxd"], re.S)[1]
    names = [name for line in re.findall(r"double (.*)", body) for name in line.split(", ")]
    return {name: place for place, name in enumerate(names)}


def first_ops(texts):
    return {name: code for name, code in members(CONFIG, "Op")(texts).items() if name in ("read", "write", "fetch")}


def recorded(texts):
    """The codes of recording.format, which are names in one row."""
    names = re.search(r"^(READ, .*) = range\((\d+)\)$", texts["shadowcore/recording/format.py"], re.M)
    return {name.lower(): place for place, name in zip(range(int(names[2])), names[1].split(", "), strict=True)}


def everything(copy):
    return copy


def accesses(copy):
    """Of operations, those that op_is_access knows."""
    rmw = range(copy["cmpxchg"], copy["xor"] + 1)
    return {name: code for name, code in copy.items() if code <= copy["fetch"] or code in rmw}


def read_modify_writes(copy):
    return {name: code for name, code in copy.items() if copy["cmpxchg"] < code <= copy["xor"]}


def same_as_op(copy):
    """Of accesses of programs, those that are operations; MODIFY is a program's alone."""
    return {name: code for name, code in copy.items() if name != "modify"}


def guests(copy):
    """Of return codes, those that end in the guest; the engine's own follow, and errors are negative."""
    return {name: code for name, code in copy.items() if 0 <= code <= copy["mmio"] or name == "ud"}


NO_EXITS = ("EXIT_FAULTS",)
CONFIG = "shadowcore/config.py"
RIGHTS = header("SC_RIGHT_", "SC_RIGHT_EXECUTE")
LISTS = {
    "counter": (
        structure(ENGINE + "counters.pxd", "cdef struct sc_stats:", r"^    u64 (\w+)(?= |$)"),
        {
            "sc_counters": (everything, structure(HEADER, "typedef struct sc_counters {", r"^    uint64_t (\w+);")),
            "Stats": (
                everything,
                structure(ENGINE + "counters.pyi", "class Stats:", r"^    (?!exits_)(\w+): Final\[int\]"),
            ),
        },
    ),
    "exit": (
        engine("EXIT_", "counters.pxd", NO_EXITS),
        {
            "EXIT_REASONS": (everything, sequence("pyx/engine/counters.pyx", "EXIT_REASONS")),
            "SC_EXIT_*": (everything, header("SC_EXIT_", "SC_EXIT_FILL")),
            "Stats": (
                everything,
                structure(ENGINE + "counters.pyi", "class Stats:", r"^    exits_(\w+): Final\[int\]"),
            ),
            "reports": (everything, labels),
        },
    ),
    "operation": (
        engine("OP_", "access.pxd"),
        {
            "Op": (everything, members(CONFIG, "Op")),
            "SC_*": (accesses, header("SC_", "SC_READ")),
            "VCpu.modify": (read_modify_writes, modifications),
        },
    ),
    "feature": (
        engine("FEAT_", "features.pxd"),
        {
            "Features": (everything, features),
            "SC_FEATURE_*": (everything, header("SC_FEATURE_", "SC_FEATURE_NX")),
        },
    ),
    "quirk": (
        engine("QUIRK_", "quirks.pxd"),
        {
            "Quirk": (everything, members(CONFIG, "Quirk", ("NONE", "KVM_2007", "KVM_6_1"))),
            "docs/series.md": (everything, quirks_in_words),
        },
    ),
    "flush": (
        engine("FLUSH_", "flushes.pxd"),
        {
            "FLUSHES": (everything, sequence("pyx/engine/mmu.pyx", "FLUSHES")),
            "SC_FLUSH_*": (everything, header("SC_FLUSH_", "SC_FLUSH_PROTECT")),
        },
    ),
    "point": (
        engine("POINT_", "hooks.pxd"),
        {
            "POINTS": (everything, sequence("shadowcore/engine/audits.py", "POINTS")),
            "VM.audit_points": (everything, points_in_words),
        },
    ),
    "event": (
        engine("EVENT_", "hooks.pxd"),
        {
            "EVENTS": (everything, sequence("pyx/engine/callbacks.pyx", "EVENTS")),
            "SC_EVENT_*": (everything, header("SC_EVENT_", "SC_EVENT_EXIT")),
        },
    ),
    "return code": (
        engine("RC_", "types.pxd"),
        {"outcomes": (guests, outcomes), "SC_*": (guests, returned)},
    ),
    "right": (engine("ACC_", "types.pxd", ("ACC_ALL",)), {"SC_RIGHT_*": (everything, rights)}),
    "call": (
        engine("CALL_", GUEST + "call.pxd", ("CALL_BARE",)),
        {"Call": (everything, members(GUEST + "options.py", "Call"))},
    ),
    "touch": (
        engine("TOUCH_", GUEST + "user.pxd"),
        {"Touch": (everything, members(GUEST + "options.py", "Touch", ("READ",)))},
    ),
    "protection": (
        engine("PROT_", GUEST + "state.pxd"),
        {"Prot": (everything, members(GUEST + "options.py", "Prot", ("NONE",)))},
    ),
    "access of a program": (
        engine("PROGRAM_", GUEST + "user.pxd"),
        {"recordings": (everything, recorded), "Op": (same_as_op, first_ops)},
    ),
    "price": (
        structure(HEADER, "typedef struct sc_prices {", r"^    double (\w+);"),
        {"prices.pxd": (everything, prices)},
    ),
}
"""By kind: the definition, and the copies, each with the part of the definition that it repeats."""


def complaints(texts, kind):
    """What copies say otherwise than the definition, in words."""
    read, copies = LISTS[kind]
    definition = read(texts)
    if "count" in definition:
        return [f"{kind}: {len(definition) - 1} entries, and a number of them that says {definition['count']}"]
    if not definition or len(set(definition.values())) != len(definition):
        return [f"{kind}: no entries, or two of one value"]
    found = []
    for place, (part, copy) in copies.items():
        wanted, there = part(definition), copy(texts)
        for name in sorted(wanted.keys() | there.keys()):
            if wanted.get(name) != there.get(name):
                found.append(f"{kind}: {name} is {there.get(name)} in {place}, {wanted.get(name)} where it is defined")
    if kind == "quirk":
        known = members(CONFIG, "Quirk")(texts)
        if known["kvm_2007"] & known["kvm_6_1"] or known["kvm_2007"] | known["kvm_6_1"] != sum(definition.values()):
            found.append("quirk: some are not in exactly one of KVM_2007 and KVM_6_1")
    if kind == "exit":
        known = header("SC_EXIT", "SC_EXIT_FILL")(texts)
        if known["s"] != len(definition):
            found.append("exit: SC_EXITS is not their number")
    if kind == "event":
        known = header("SC_EVENT", "SC_EVENT_EXIT")(texts)
        if known["s"] != len(definition):
            found.append("event: SC_EVENTS is not their number")
    return found


@pytest.mark.parametrize("kind", LISTS)
def test_every_copy_of_a_list_is_that_list(texts, kind):
    assert complaints(texts, kind) == []


@pytest.mark.parametrize(
    ("kind", "file", "one", "other"),
    [
        ("counter", HEADER, "uint64_t tlb_hits;", "uint64_t tlb_misses;"),
        ("counter", ENGINE + "counters.pyi", "tlb_hits", "tlb_misses"),
        ("exit", "pyx/engine/counters.pyx", '"cr0"', '"cr3"'),
        ("feature", CONFIG, "smep: bool", "smap: bool"),
        ("quirk", CONFIG, "RMAP_LEAK =", "PDE_WRITE ="),
        ("flush", "pyx/engine/mmu.pyx", '"leaf"', '"link"'),
    ],
)
def test_two_that_change_places_are_noticed(texts, kind, file, one, other):
    swapped = texts[file].replace(one, "\0").replace(other, one).replace("\0", other)
    assert swapped != texts[file]
    assert complaints({**texts, file: swapped}, kind)


NUMBERS = r"^([A-Z]\w+(?:, [A-Z]\w+)*) = ((?:0x[0-9A-Fa-f]+|\d+|<<|\||, | )+)$"
"""A line of Python that gives numbers names."""


def constants(texts):
    """Numbers by names of a list (PREFIX_NAME) of the engine or of registers' bits, wherever they stand: name ->
    {value: places}."""
    found = {}
    known = {}
    for path, text in texts.items():
        if path.endswith(".pxd"):
            for name, value in re.findall(r"^    ([A-Z]+_\w+) = ([^#\n]+)", text, re.M):
                known[name] = number(value, known)
                found.setdefault(name, {}).setdefault(known[name], []).append(path)
    for path, text in texts.items():
        if not path.endswith(".py"):
            continue
        for names, values in re.findall(NUMBERS, text, re.M):
            for name, value in zip(names.split(", "), values.split(", "), strict=True):
                if name in known or re.match(r"(CR[04]|EFER)_", name):
                    found.setdefault(name, {}).setdefault(number(value), []).append(path)
    return found


def test_a_name_has_one_value(texts):
    """Register bits, error code bits and the like, where Python has them again."""
    found = constants(texts)
    assert {"CR0_WP", "CR0_PG", "PF_PK", "SC_NONE", "ROLE_LEVEL"} <= found.keys()
    assert {name: values for name, values in found.items() if len(values) > 1} == {}


# What CONTRIBUTING.md says is to be written for an entry: file, the line after which it goes, and the line. <LAST>
# and <last> stand for the last entry of the list that there is, <N> for how many there are.


def enumerator(prefix, value):
    """An enumerator of shadowcore.h after the last one of a kind."""
    like = rf"(    SC_{prefix}<LAST> = [^,/\n]*?)(,?)( */\*.*\*/)?\n"
    return (HEADER, like, rf"\1,\3\n    SC_{prefix}DUMMY = {value}\2\n")


def line(file, like, text):
    """A line after one that looks `like` this."""
    return (file, f"({like}.*\n)", f"\\1{text}\n")


def counted(file, name):
    """A number of entries, one more."""
    return (file, rf"({name} = )<N>\b", r"\g<1><N+1>")


ADDED = {
    "counter": [
        line(ENGINE + "counters.pxd", r"    u64 <last>\b", "    u64 dummy"),
        line(HEADER, r"    uint64_t <last>;", "    uint64_t dummy;"),
        line(ENGINE + "counters.pyi", r"    <last>: Final\[int\]", "    dummy: Final[int]"),
    ],
    "exit": [
        line(ENGINE + "counters.pxd", r"    EXIT_<LAST> = ", "    EXIT_DUMMY = <N>"),
        counted(ENGINE + "counters.pxd", "EXIT_COUNT"),
        ("pyx/engine/counters.pyx", r"(EXIT_REASONS = \(.*?)\)", r'\1, "dummy")'),
        enumerator("EXIT_", "<N>"),
        counted(HEADER, "SC_EXITS"),
        line(ENGINE + "counters.pyi", r"    exits_<last>: Final\[int\]", "    exits_dummy: Final[int]"),
        line("shadowcore/report/document.py", r'    "<last>": ', '    "dummy": "an exit",'),
    ],
    "operation": [
        line(ENGINE + "access.pxd", r"    OP_<LAST> = ", "    OP_DUMMY = <N>"),
        counted(ENGINE + "access.pxd", "OP_COUNT"),
        line(CONFIG, r"    <LAST> = ", "    DUMMY = <N>"),
    ],
    "feature": [
        line(ENGINE + "features.pxd", r"    FEAT_<LAST> = ", "    FEAT_DUMMY = 1 << <N>"),
        counted(ENGINE + "features.pxd", "FEAT_COUNT"),
        line(CONFIG, r"    <last>: bool = ", "    dummy: bool = True"),
        enumerator("FEATURE_", "1 << <N>"),
    ],
    "quirk": [
        line(ENGINE + "quirks.pxd", r"    QUIRK_<LAST> = ", "    QUIRK_DUMMY = 1 << <N>"),
        counted(ENGINE + "quirks.pxd", "QUIRK_COUNT"),
        line(CONFIG, r"    <LAST> = ", "    DUMMY = 1 << <N>"),
        (CONFIG, r"(KVM_6_1 = \w.*)", r"\1 | 1 << <N>"),
        line("docs/series.md", r"\| `<LAST>` \|", "| `DUMMY` | a defect | `test` |"),
    ],
    "flush": [
        line(ENGINE + "flushes.pxd", r"    FLUSH_<LAST> = ", "    FLUSH_DUMMY = <N>"),
        counted(ENGINE + "flushes.pxd", "FLUSH_COUNT"),
        ("pyx/engine/mmu.pyx", r"(FLUSHES = \([^)]*)\)", r'\1, "dummy")'),
        enumerator("FLUSH_", "<N>"),
    ],
    "point": [
        line(ENGINE + "hooks.pxd", r"    POINT_<LAST> = ", "    POINT_DUMMY = <N>"),
        counted(ENGINE + "hooks.pxd", "POINT_COUNT"),
        ("shadowcore/engine/audits.py", r"(\nPOINTS = \(.*?)\)", r'\1, "dummy")'),
        (ENGINE + "machine.py", r'("post-sync")', r'\1, "dummy"'),
    ],
    "event": [
        line(ENGINE + "hooks.pxd", r"    EVENT_<LAST> = ", "    EVENT_DUMMY = <N>"),
        counted(ENGINE + "hooks.pxd", "EVENT_COUNT"),
        ("pyx/engine/callbacks.pyx", r"(\nEVENTS = \(.*?)\)", r'\1, "dummy")'),
        enumerator("EVENT_", "<N>"),
        counted(HEADER, "SC_EVENTS"),
    ],
}


def changed(texts, kind, edits):
    """The texts with these edits, each of one place."""
    definition = LISTS[kind][0](texts)
    last, n = list(definition)[-1], len(definition)
    made = dict(texts)
    for file, like, text in edits:
        for name, value in (("LAST", last.upper()), ("last", last), ("N", n), ("N+1", n + 1)):
            like, text = like.replace(f"<{name}>", str(value)), text.replace(f"<{name}>", str(value))
        made[file], times = re.subn(like, text, made[file])
        assert times == 1, (file, like, times)
    return made


@pytest.mark.parametrize("kind", ADDED)
def test_what_an_entry_needs(texts, kind):
    """With all of the lines nothing is wrong; with any of them missing, something is."""
    assert complaints(changed(texts, kind, ADDED[kind]), kind) == []
    for left_out in ADDED[kind]:
        assert complaints(changed(texts, kind, [edit for edit in ADDED[kind] if edit is not left_out]), kind), left_out


@pytest.mark.parametrize("kind", ADDED)
def test_contributing_says_where(texts, kind):
    """Each file that an entry needs is named where CONTRIBUTING.md tells how to add one."""
    section = texts["CONTRIBUTING.md"].split("## To add to a list")[1].split("\n## ")[0]
    (row,) = re.findall(rf"^\| an? {kind}\b.*", section, re.M)
    missing = {file for file, *_ in ADDED[kind] if f"`{Path(file).name}`" not in row}
    assert not missing
