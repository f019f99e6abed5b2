"""The law of the house: imports point downwards, between the floors and inside of the engine, and make no circle.

Read are all of them: `import`, `from ... import`, `cimport`, at the top of a file, inside of a function, and those that
only type checkers see.
"""

import ast
import importlib.util
import itertools
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = (
    ("errors", "_version"),
    ("plugins",),
    ("config", "files", "notebook", "npy"),
    ("columns",),
    ("engine",),
    ("guest", "pagetables", "recording", "unicorn"),
    ("_capi", "workload"),
    ("embed", "programs"),
    ("studies",),
    ("report",),
    ("cli", "heat", "html", "importers", "recordings", "steps", "timeline", "trace"),
)
"""Packages and modules of shadowcore, lowest floor first. Those of one floor do not import each other. `shadowcore`
itself, the table of contents, may import all, and nobody imports it."""

ENGINE = (
    "types check held designs policies unsync nested agile",
    "bits counters gmode tlb memo watch backing slots levels presets tlbs explained",
    "memory results windows prices costs reported shown audits",
    "walker features page quirks role future",
    "policies.queues history",
    "state",
    "hooks record recorded policies.recorder references",
    "flushes design path floods tlbhit",
    "rmap",
    "spte marks",
    "absent",
    "pool",
    "roots invalidate zap agile.rule",
    "leaf",
    "sync",
    "emulate nested.translated",
    "fetch invariants unsync.logs unsync.roots nested.tables agile.tables",
    "lagging unsync.stores nested.logs nested.roots agile.walks",
    "unsync.faults nested.faults",
    "fault fast policies.common policies.scripted",
    "designs.native designs.flush designs.cached designs.unsync designs.nested policies.fifo policies.lru "
    "policies.clock policies.twoq policies.arc policies.lirs policies.sieve policies.s3fifo policies.random "
    "policies.cost policies.optimal policies.plugged policies.uses neighbours exits",
    "designs.adaptive designs.agile",
    "resolve registers translation",
    "mmu access",
    "audit quick policies.references callbacks",
    "batch events exitlog",
    "vcpu",
    "snapshot",
    "machine",
)
"""The modules of shadowcore.engine in the same way."""

BOOKKEEPING = {"common", "plugged", "queues", "recorder", "references", "scripted", "uses"}
"""Modules of engine/policies that are no policy."""

CAPI = ("header", "handles", "accesses lifecycle look shadow slots tables", "table")
"""Those of shadowcore._capi."""

PYTHON = re.compile(r"^[ \t]*((?:from[ \t]+[\w.]+[ \t]+)?import[ \t]+(?:\([^)]*\)|[^\n#]*))", re.M)
"""An import of Python in a Cython text."""


def modules():
    """The files of each module, by its name."""
    found = {}
    for base in (ROOT / "shadowcore", ROOT / "pyx"):
        for path in sorted(base.rglob("*.p*")):
            if path.suffix in (".py", ".pyi", ".pyx", ".pxd"):
                parts = ["shadowcore", *path.relative_to(base).with_suffix("").parts]
                found.setdefault(".".join(parts).removesuffix(".__init__"), []).append(path)
    return found


@pytest.fixture(scope="module")
def cimports():
    """The function of setup.py."""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    spec = importlib.util.spec_from_file_location("shadowcore_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cimports


def imported(path, package, cimports):
    """Dotted names that a file of `package` imports from."""
    text = path.read_text("utf-8")
    found = set()
    if path.suffix in (".pyx", ".pxd"):
        found = set(cimports(text, package))
        text = "\n".join(statement for statement in PYTHON.findall(text) if "cimport" not in statement)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


@pytest.fixture(scope="module")
def graph(cimports):
    """For each module, the modules that it imports, itself left out."""
    known = modules()
    result = {}
    for name, paths in known.items():
        result[name] = set()
        for path in paths:
            package = name if path.stem == "__init__" else name.rpartition(".")[0]
            for target in imported(path, package, cimports):
                while target and target not in known:
                    target = target.rpartition(".")[0]
                if target and target != name:
                    result[name].add(target)
    return result


def test_every_import_is_seen(cimports, tmp_path):
    for name, text in {
        "a.py": "import shadowcore.a\nfrom . import b\nfrom ..c import d\ndef f():\n    from .e.f import (g,\n h)\n",
        "a.pyx": "from shadowcore.a cimport b\nfrom shadowcore.c import (\n  d, e)\ndef f():\n  import shadowcore.g\n",
    }.items():
        (tmp_path / name).write_text(text, "utf-8")
    python = imported(tmp_path / "a.py", "shadowcore.x", cimports)
    assert python == {"shadowcore.a", "shadowcore.x.b", "shadowcore.c.d", "shadowcore.x.e.f.g", "shadowcore.x.e.f.h"}
    cython = imported(tmp_path / "a.pyx", "shadowcore.x", cimports)
    assert cython == {
        "shadowcore.a", "shadowcore.a.b", "shadowcore.c.d", "shadowcore.c.e", "shadowcore.g"
    }  # fmt: skip


def test_floors(graph):
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    house = {name.split(".")[1] for name in graph if "." in name and not header_only(name)}
    assert house == set(floor)
    wrong = []
    for name, targets in graph.items():
        if name == "shadowcore" or header_only(name):
            continue
        wrong += [
            f"{name} imports {target}"
            for target in targets
            if target == "shadowcore"
            or (name.split(".")[1] != target.split(".")[1] and floor[target.split(".")[1]] >= floor[name.split(".")[1]])
        ]
    assert wrong == []


def header_only(name):
    """A header at the top, which names one of the engine for those who cimport it by its short name."""
    return all(path.suffix == ".pxd" for path in modules()[name]) and name.count(".") == 1


@pytest.mark.parametrize(("package", "rows"), [("engine", ENGINE), ("_capi", CAPI)])
def test_order_inside_of_a_package(graph, package, rows):
    order = {name: number for number, names in enumerate(rows) for name in names.split()}
    prefix = f"shadowcore.{package}."
    inside = {name.removeprefix(prefix): targets for name, targets in graph.items() if name.startswith(prefix)}
    assert set(inside) == set(order)
    wrong = []
    for name, targets in inside.items():
        below = {target.removeprefix(prefix) for target in targets if target.startswith(prefix)}
        wrong += [f"{name} imports {target}" for target in below if order[target] >= order[name]]
    assert wrong == []


def test_no_circle(graph):
    TopologicalSorter({name: targets for name, targets in graph.items() if name != "shadowcore"}).prepare()


def test_a_file_format_knows_no_machine(graph):
    """What reads and writes the files of recordings; the replay is what makes machines of them."""
    for name in ("format", "packing", "archive", "npz", "reader", "guest"):
        below = graph[f"shadowcore.recording.{name}"]
        assert [target for target in below if target.startswith("shadowcore.engine")] == []
        assert "shadowcore.recording.replay" not in below


ASKED = {
    "shadow": {"access", "invariants", "mmu", "quick", "references", "resolve", "state", "tlbhit", "_capi", "unicorn"},
    "by_table": {"fast", "leaf", "state"},
    "nested": {"access", "gmode", "invariants", "mmu", "quick", "references", "resolve", "state", "_capi"},
}
"""Where the three constants are read by which designs differ inline: modules of the engine, packages above it.
docs/design.md says what for."""


def test_only_its_file_knows_a_design():
    """What a design does is behind the hooks of sc_design: nothing else asks which one it is."""
    found = {name: set() for name in ASKED}
    for module, paths in modules().items():
        for path in paths:
            if path.suffix in (".pyx", ".pxd") and ".engine.designs." not in module:
                text = path.read_text("utf-8")
                assert not re.search(r"design\.(keep|name) *[=!]=|\bc\.keep\b|mmu\.keep\b", text), path
                for name, places in found.items():
                    if re.search(rf"\b(mmu|c|bint)\.? ?{name}\b", text):
                        places.add(module.removeprefix("shadowcore.").removeprefix("engine.").split(".")[0])
    assert found == ASKED


def test_a_design_and_a_policy_is_a_file_and_a_line():
    from shadowcore.config import DESIGNS

    table = (ROOT / "pyx" / "engine" / "mmu.pyx").read_text("utf-8")
    for folder, kind in (("designs", "design"), ("policies", "policy")):
        files = {path.stem for path in (ROOT / "pyx" / "engine" / folder).glob("*.pyx")}
        lines = re.findall(rf'^    "[\w-]+": <size_t>(\w+)_{kind},$', table, re.M)
        assert sorted(files - BOOKKEEPING) == sorted(lines)
    assert {made().engine for made in DESIGNS.values()} == {
        path.stem for path in (ROOT / "pyx" / "engine" / "designs").glob("*.pyx")
    }


STATE = ["features", "flushes", "hooks", "page", "quirks", "role", "state"]
"""What the header `state` was cut into."""


def test_short_names_of_headers():
    """Those that were published before there were packages."""
    for name in filter(header_only, modules()):
        (path,) = modules()[name]
        targets = {"events": ["counters"], "state": STATE}.get(path.stem, [path.stem])
        assert path.read_text("utf-8") == "".join(f"from shadowcore.engine.{name} cimport *\n" for name in targets)


def printed(title):
    """The rows of the block of code under the heading `title` of docs/design.md, numbers dropped."""
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    block = text.split(f"### {title}\n", 1)[1].split("```\n", 1)[1].split("```", 1)[0]
    return tuple(tuple(line.split("  ")[0].split()[1:]) for line in block.strip().splitlines())


def test_the_architecture_page_prints_the_same_order():
    assert printed("Floors")[::-1] == FLOORS
    assert printed("Inside of the engine")[::-1] == tuple(tuple(names.split()) for names in ENGINE)


PAGE = (ROOT / "docs" / "design.md").read_text("utf-8")


def ways(heading):
    """The ways under a heading of docs/design.md: titles and texts."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0] + "\n##"
    return re.findall(r"^### ([^\n]*)\n(.*?)(?=^##)", section, re.M | re.S)


WAYS = ways("Four ways through the house")
UNSYNC_WAYS = ways("The same ways under `unsync`")
STEP = re.compile(r"^\d+\. `([\w/.]+)`: `(\w+)`(?:, by (the hook|way of) `(\w+)`)?", re.M)


def body(file, function):
    """The text of a function, from its head to the next line that is not indented."""
    text = (ROOT / file).read_text("utf-8")
    head = re.search(rf"^([ ]*)(?:cdef|cpdef|def)\b[^\n]*\b{function}\(", text, re.M)
    assert head, (file, function)
    rest = text[text.index("\n", head.end()) :]
    end = re.search(rf"^[ ]{{0,{len(head[1])}}}[^\s)]", rest, re.M)
    return rest[: end.start()] if end else rest


@pytest.mark.parametrize(("title", "text"), WAYS + UNSYNC_WAYS, ids=[title for title, _ in WAYS + UNSYNC_WAYS])
def test_ways_through_the_house(title, text):
    """Each function is where the page says, and calls the next, or the hook behind which that is, or hands it to what
    calls it."""
    steps = STEP.findall(text)
    hooks = "".join(path.read_text("utf-8") for path in (ROOT / "pyx" / "engine" / "designs").glob("*.pyx"))
    assert len(steps) == len(re.findall(r"^\d+\. ", text, re.M)) >= 6
    for (file, function, *_), (_, next_function, how, other) in itertools.pairwise(steps):
        assert re.search(rf"\b{other or next_function}\(", body(file, function)), (file, function, next_function)
        if how == "way of":
            assert re.search(rf"\b{other}\(.*\b{next_function}, ", body(file, function))
        elif other:
            assert re.search(rf"\.{other} = {next_function}$", hooks, re.M)
    body(*steps[-1][:2])


def test_the_four_ways_are_there():
    assert [title for title, _ in WAYS] == ["One access", "One fault", "One store to a table", "One CR3 load"]
    assert len(UNSYNC_WAYS) == 4
