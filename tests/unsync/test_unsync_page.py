"""docs/unsync.md prints what its example prints, and its table of settings has the defaults."""

import re
import subprocess
import sys

from places import LINUX_FORK, ROOT

import shadowcore as sc
from shadowcore.recording import replay as trace

PAGE = (ROOT / "docs" / "unsync.md").read_text("utf-8")


def block(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    return found


def test_the_example_prints_what_the_page_says():
    done = subprocess.run([sys.executable, "-c", block("python")], capture_output=True, text=True, check=True)
    assert done.stdout == block("text")


def test_what_the_page_says_of_other_designs():
    """The eight stores of the fork under `cached`; the last store under 6.12."""
    code = block("python").replace('"unsync")', '"kvm-6.12")')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split("  ")[-1].strip() == "exit 1, leaf 1"


def test_the_defaults():
    made = sc.Shadow.unsync()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)?) \| ([^|]*) \|", PAGE, re.M)
    said = {}
    for names, values in rows:
        said.update(zip(re.findall(r"`(\w+)`", names), values.strip().split(", "), strict=True))
    quirks = said.pop("quirks")
    assert quirks == "NONE"
    assert made.quirks == sc.Quirk.NONE
    assert {name: str(getattr(made, name)) for name in said} == {n: v.strip('"') for n, v in said.items()}
    assert set(said) == {
        "pool_pages",
        "min_free",
        "refill",
        "flood_threshold",
        "prev_roots",
        "prefetch",
        "notpresent_marker",
        "release",
    }


def test_exits_of_linux_fork():
    """Beside those of the real kernel, of which so many fill a window that the replay here does not need."""
    facts = (ROOT / "tests" / "data" / "kvm-6.1" / "FACTS.md").read_text("utf-8")
    boot, workload = re.search(r"KVM 6\.1, limit 256 pages \| ([\d,]+) \| ([\d,]+) ", facts).groups()
    window = re.search(r"([\d,]+) \(boot\) and ([\d,]+) \(workload\) of KVM's exits fill the window", facts).groups()
    real, filled = (sum(int(n.replace(",", "")) for n in pair) for pair in ((boot, workload), window))
    ours = trace.replay(trace.load(LINUX_FORK), "kvm-6.1").whole.counters["pf_taken"]
    assert f"it took {real:,} page-fault exits after the first CR3 load, {filled:,} of which" in PAGE
    assert f"takes {ours:,}." in PAGE
    assert abs(ours - (real - filled)) < 0.02 * real
