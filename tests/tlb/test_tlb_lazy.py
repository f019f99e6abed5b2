"""Random programs under a TLB: whatever the processor remembers, it is what the architecture lets it remember.

After each access its outcome and all of memory have to be among those that the model of a forgetful processor lists
(lazy_oracle.py).  A program that invalidates what it edits cannot tell that there is a TLB."""

import lazy_oracle
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import operations
from oracle import CR3, CR4, CR4_PCIDE, CR4_PGE, INVLPG, OK, READ, WRITE
from samples import sampled, sampled_examples
from tlb_programs import (
    DESIGNS,
    MODES,
    PROGRAMS,
    SLOTS,
    TABLES,
    TLBS,
    Steps,
    Together,
    linear_pages,
    machine,
    program_on,
    registers,
    seeded,
    step,
    store_entries,
)

import shadowcore as sc

# Half of what the profile asks for: evenly random programs find more, and are run besides.
fewer_examples = sampled_examples(share=2)


@fewer_examples
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", MODES)
def test_every_outcome_is_allowed(mode, design, examples):
    variants = DESIGNS[design]
    tlbs = TLBS if design == "native" else [*TLBS, None]

    @settings(max_examples=examples)
    @given(st.sampled_from(variants), st.sampled_from(tlbs), PROGRAMS)
    def run(variant, tlb, program):
        program_on(MODES[mode], variant, tlb, program)

    run()


@sampled("number", 150)
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("mode", MODES)
def test_long_programs(mode, design, number):
    for seed, tlb, program in seeded(1000, number):
        variant = DESIGNS[design][seed % len(DESIGNS[design])]
        try:
            program_on(MODES[mode], variant, tlb, program)
        except AssertionError as error:
            raise AssertionError(f"program of seed {seed}") from error


@pytest.mark.parametrize(
    ("design", "lost"),
    [
        *[("native", name) for name in ("cr3", "context", "invlpg", "fault")],
        *[("cached", name) for name in ("cr3", "protect")],
        ("flush", "invlpg"),
    ],
)
def test_a_lost_flush_is_noticed(design, lost):
    """The model is not so forgetful that it would accept anything: without the flush some program is told from a
    right one by what it reads or writes."""

    def parts_from_the_model(tlb, program):
        mmu, habits = DESIGNS[design][0]
        together = Together([MODES["64"]], mmu, tlb, **habits)
        together.vm.mmu.lose_flushes(lost)
        try:
            for number in program:
                together.step(number)
        except AssertionError:
            return True
        return False

    assert any(parts_from_the_model(tlb, program) for _, tlb, program in seeded(5000, 400))


def test_stale_translations_are_met():
    """Often enough an access has an outcome that only a remembered translation explains."""
    met = sum(program_on(MODES["64"], DESIGNS["native"][0], tlb, p).by_memory for _, tlb, p in seeded(0, 50))
    assert met > 50


# -- programs that keep the rules ------------------------------------------------------------------------


class Careful(Steps):
    """Runs a program on the oracle, which has no TLB, with an invalidation after whatever needs one; `rows` are the
    operations that it made.

    Each address space has a PCID of its own as long as there are PCIDs.  What an address space has to itself is not
    global: `careful` chooses how to invalidate after an edit.
    """

    def __init__(self, mode, invalidate):
        super().__init__(mode, oracle.Cpu(lazy_oracle.FlatMemory(*SLOTS)))
        store_entries([mode], self.cpu.memory.write)
        self.invalidate = invalidate
        self.rows, self.seen = [], []
        for op, value in registers(mode):
            self.op(op, value=value)

    def op(self, op, address=0, value=0, size=8, user=0):
        result = self.cpu.step(op, address, value, size, bool(user))
        self.rows.append((int(op), address, value, size, user))
        self.seen.append(result)
        if op == WRITE and result[0] == OK and result[2] >> 12 in TABLES:
            self.edited()

    def device(self, gpa, value, size):
        self.rows.append((gpa, value.to_bytes(size, "little")))
        self.cpu.memory.write(gpa, value, size)
        self.edited()

    def edited(self):
        """A table has changed."""
        if self.invalidate == "INVLPG":
            # What the edit was about is not looked up: each page that the program uses goes.
            for address in linear_pages(self.mode):
                self.op(INVLPG, address)
        else:
            self.drop_everything()

    def drop_everything(self):
        for _ in range(2):
            self.toggle("cr4", CR4_PGE)

    def step(self, step):
        match step:
            case ("cr3", space, _, keep):
                pcid = space + 1 if self.cpu.cr4 & CR4_PCIDE else 0
                super().step(("cr3", space, pcid, keep))
                if self.cpu.cr4 & CR4_PGE:
                    self.drop_everything()  # the spaces do not have their global pages in common
            case ("toggle", "cr4", bit) if bit == CR4_PCIDE and not self.cpu.cr4 & CR4_PCIDE:
                super().step(step)
                super().step(("cr3", 0, 1, 0))  # PCID 0 is used without PCIDs alone
                super().step(("cr3", 1, 2, 0))
                self.drop_everything()
            case _:
                super().step(step)


def run_careful(careful, design, tlb):
    """The operations of a careful program on an engine: (vm, results)."""
    vm = machine([careful.mode], design, tlb)
    seen, batch = [], []

    def run_batch():
        if batch:
            result = vm.vcpus[0].run(operations(*batch))
            seen.extend(
                zip(*(getattr(result, key).tolist() for key in ("outcome", "error_code", "gpa", "value")), strict=True)
            )
            batch.clear()

    for row in careful.rows:
        if len(row) == 2:
            run_batch()
            vm.write_physical(*row)
        else:
            batch.append(row)
    run_batch()
    return vm, seen


def assert_same(careful, design, tlb):
    vm, seen = run_careful(careful, design, tlb)
    ops = [row for row in careful.rows if len(row) == 5]
    for number, (op, got, want) in enumerate(zip(ops, seen, careful.seen, strict=True)):
        n = 4 if op[0] == READ and want[0] == OK else 3
        assert got[:n] == want[:n], (design, tlb, number, op)
    assert np.array_equal(vm.memory.bytes, careful.cpu.memory.bytes)
    assert vm.vcpus[0].cr2 == careful.cpu.cr2
    report = vm.audit()
    assert report.ok, report
    return vm


@fewer_examples
@pytest.mark.parametrize("mode", MODES)
def test_who_invalidates_cannot_tell(mode, examples):
    """A program that keeps the rules is identical to one on a processor without a TLB, in every design."""

    @settings(max_examples=examples)
    @given(st.sampled_from(["INVLPG", "CR4.PGE"]), st.sampled_from(TLBS), PROGRAMS)
    def run(invalidate, tlb, program):
        careful = Careful(MODES[mode], invalidate)
        for number in program:
            careful.step(step(MODES[mode], number))
        for variants in DESIGNS.values():
            assert_same(careful, variants[0][0], tlb)

    run()


class Careless(Careful):
    """Invalidates nothing, and has neither global pages nor PCIDs."""

    def edited(self):
        pass

    def step(self, step):
        match step:
            case ("toggle", "cr4", bit) if bit in (CR4_PCIDE, CR4_PGE):
                pass
            case ("cr3", space, _, _):
                self.op(CR3, value=self.mode.roots[space])
            case _:
                Steps.step(self, step)


@fewer_examples
@pytest.mark.parametrize("mode", MODES)
def test_cached_sees_every_edit(mode, examples):
    """`cached` flushes when a table is stored to: where no translation may outlive a load of CR3, no program at all
    can tell that there is a TLB."""

    @settings(max_examples=examples)
    @given(st.sampled_from(TLBS), PROGRAMS)
    def run(tlb, program):
        careless = Careless(MODES[mode], None)
        careless.op(CR4, value=MODES[mode].cr4)
        for number in program:
            careless.step(step(MODES[mode], number))
        for pages in (32, 8):
            assert_same(careless, sc.Shadow.cached(pool_pages=pages), tlb)

    run()
