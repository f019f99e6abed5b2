"""A real host's counts: texts of KVM's trace events and tables of perf kvm stat, and `shadowcore check`."""

import json
import random

import pytest
from commands import refused, run
from places import DATA

import shadowcore as sc
from shadowcore.studies import host

SHORT = ("pingpong", "--operations", 20_000)

INTEL = (DATA / "host" / "intel.txt").read_text()
EXITS = {"fill": 1, "guest": 1, "write": 1, "emulate": 1, "mmio": 1}
EXITS |= {"cr3": 1, "cr0": 1, "cr4": 1, "efer": 1, "invlpg": 1}

AMD = (DATA / "host" / "amd.txt").read_text()

PERF = (DATA / "host" / "perf.txt").read_text()


def counts(tmp_path, text):
    (tmp_path / "trace.txt").write_text(text)
    return host.read(tmp_path / "trace.txt")


def nonzero(counts):
    return {name: count for name, count in counts.items() if count}


def test_exits_and_events_of_intel(tmp_path):
    found = counts(tmp_path, INTEL)
    assert nonzero(found.exits) == EXITS
    assert found.exits_total == 10
    assert found.groups == {"page faults": 5, "control registers": 3, "EFER": 1, "INVLPG": 1}
    assert found.other == {"CR_ACCESS": 1, "MSR_WRITE": 1, "EXCEPTION_NMI": 1, "HLT": 1}
    expected = {"kvm_page_fault": 5, "kvm_mmu_get_page new": 1, "kvm_inj_exception #PF": 1, "kvm_mmu_unsync_page": 1}
    expected |= {"kvm_mmu_sync_page": 1, "kvm_emulate_insn": 2, "handle_mmio_page_fault": 1}
    assert {name: found.events[name] for name in expected} == expected
    assert "sched_switch" not in found.events
    assert not found.lost
    assert found.notes() == []


def test_exits_of_amd(tmp_path):
    found = counts(tmp_path, AMD)
    assert nonzero(found.exits) == {"fill": 1, "cr3": 1, "cr4": 1, "invlpg": 1}
    assert found.other == {"interrupt": 1}


def test_page_faults_without_exits(tmp_path):
    """Of the events kvmmmu:* and kvm_page_fault alone."""
    text = "".join(
        f" q-5 [000] 1.{n}: kvm_page_fault: address 7000 error_code {code}\n" for n, code in enumerate("267")
    )
    assert nonzero(counts(tmp_path, text).exits) == {"fill": 2, "write": 1}
    found = host.read(DATA / "odd-files" / "kvmtrace.txt")
    assert (found.nested, nonzero(found.exits), found.events["kvm_mmu_get_page new"]) == (1, {}, 1)


def test_two_dimensional_paging_is_told(tmp_path):
    text = " q-5 [000] 1.0: kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x1 info1 0x181 info2 0x0\n"
    text += " q-5 [000] 1.1: kvm_page_fault: vcpu 0 rip 0x1 address 0x7000 error_code 0x181\n"
    found = counts(tmp_path, text)
    assert (found.nested, found.exits_total, found.other) == (1, 0, {"EPT_VIOLATION": 1})
    assert "ept=0" in found.notes()[0]
    assert "ept=0" in run("check", *SHORT, "--trace", tmp_path / "trace.txt").replace("\n", " ")


@pytest.mark.parametrize("line", ["CPU:3 [LOST 17 EVENTS]", "CPU:1 [5 EVENTS DROPPED]", "CPU 3 [LOST 17 EVENTS]"])
def test_lost_events_are_told(tmp_path, line):
    for text in (INTEL.replace("CPU 2 is empty", line), INTEL + line + "\n"):
        found = counts(tmp_path, text)
        assert found.lost
        assert nonzero(found.exits) == EXITS
        assert "too low" in found.notes()[0]


def test_a_table_of_perf(tmp_path):
    found = counts(tmp_path, PERF)
    assert found.kind == "perf kvm stat"
    assert found.groups == {"page faults": 49040, "control registers": 4000, "EFER": None, "INVLPG": 1000}
    assert found.exits["fill"] is None
    assert nonzero(found.other) == {"HLT": 437}
    assert "EXCEPTION_NMI counts all exceptions" in found.notes()[0]


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", None, "there are none"),
        ("\n\n", None, "there are none"),
        ("# tracer: nop\n", None, "there are none"),
        ("hello\n", 1, "a trace event such as"),
        (INTEL + "CPU 0/KVM-501 [000]  9.0", INTEL.count("\n") + 1, "a trace event such as"),
        (" q-5 [000] 1.0: sched_switch: x\n", None, "there are none"),
        (PERF.partition("HLT")[0] + "\n", 10, "the text ends before"),
        (PERF.replace("4000", "4001"), 12, "rows of 54477 samples together expected, as it says here, not 54478"),
        (PERF.replace("     7.00%", " x 7.00%"), 8, "a row of a table"),
        ("I  00401000,3\n", 1, "a trace event such as"),
    ],
)
def test_other_texts_are_refused(tmp_path, text, line, expected):
    with pytest.raises(sc.TraceError) as caught:
        counts(tmp_path, text)
    assert caught.value.file == str(tmp_path / "trace.txt")
    assert expected in str(caught.value)
    assert caught.value.record == line


@pytest.mark.parametrize("seed", range(150))
def test_damaged_texts_are_counted_or_refused(tmp_path, seed):
    rng = random.Random(seed)
    data = bytearray(rng.choice((INTEL, AMD, PERF)).encode())
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data))
        if rng.random() < 0.5:
            data[at] = rng.randrange(256)
        else:
            del data[at : at + rng.randrange(1, 60)]
    (tmp_path / "trace.txt").write_bytes(data)
    try:
        found = host.read(tmp_path / "trace.txt")
    except sc.TraceError:
        return
    assert found.exits_total >= 0


# -- the command ---------------------------------------------------------------------------------------------


def test_a_host_beside_a_study(tmp_path):
    (tmp_path / "intel.txt").write_text(INTEL)
    (tmp_path / "perf.txt").write_text(PERF)
    traces = ("--trace", tmp_path / "intel.txt", "--trace", tmp_path / "perf.txt")
    plain = json.loads(run("check", *SHORT, *traces, "--mmu", "unsync", "--mmu", "cached", "--json"))
    assert [each["kind"] for each in plain["hosts"]] == ["trace events", "perf kvm stat"]
    study = sc.study("pingpong", ("unsync", "cached"), operations=20_000, windows=0)
    for name, design in study.designs.items():
        made = plain["designs"][name]
        assert made["exits"] == design.exits
        assert sum(made["groups"].values()) == made["exits_total"] == design.exits_total
        assert made["events"]["kvm_emulate_insn"] >= design.counters["pf_emulate"]
        assert made["events"]["kvm_mmu_sync_page"] == design.counters["synced"]
    text = run("check", *SHORT, *traces)
    for word in ("CR3 load", "not told", "other exits: HLT", "kvm_mmu_unsync_page", "unsync"):
        assert word in text


def test_what_check_refuses(tmp_path):
    (tmp_path / "intel.txt").write_text(INTEL)
    assert "--trace" in refused("check", *SHORT)
    assert "No such file" in refused("check", *SHORT, "--trace", tmp_path / "none")
    assert "lime.bin" in refused("check", *SHORT, "--trace", DATA / "odd-files" / "lime.bin")
    assert "none.screc" in refused("check", "none.screc", "--trace", tmp_path / "intel.txt")
