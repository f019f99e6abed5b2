"""A guest processor that runs operations on a machine: its accesses, and the hypervisor's emulator of instructions.

An operation is a few accesses (rows of kind, user, size, main, address). An access that the machine cannot serve exits;
the machine handles the fault, and the instruction starts again from its fetch, is emulated, or gets an exception.
"""

from kvmbits import DEVICE_ACCESS, EMULATE, GP, PF_I, PF_U, PF_W, Fault

READ, WRITE, FETCH, CR3, CR0, CR4, EFER, INVLPG, ANDB, XCHG, INC, OR, ADD, MODE, POKE = range(15)
CMPXCHG8B, CMPXCHG16B, CMPXCHG, MOVQ_XMM, MOVLPS, MOVQ_MM, MOVUPS, MOVDQA, MOVAPS, MOVNTDQ = range(15, 25)
LOG, GETLOG, CLEARLOG, SLOT, DISCARD, HREAD, COLLAPSE = 32, 34, 35, 36, 37, 38, 40  # of the client
REGISTERS = {CR3: "cr3", CR0: "cr0", CR4: "cr4", EFER: "efer", INVLPG: "invlpg"}
COMPARE = {CMPXCHG8B, CMPXCHG16B, CMPXCHG}
STORE = {WRITE, XCHG, MOVQ_XMM, MOVLPS, MOVQ_MM, MOVUPS, MOVDQA, MOVAPS, MOVNTDQ}
READ_FIRST = {ANDB, XCHG, INC, OR, ADD} | COMPARE  # these read, then write
# The emulator does not know these as instructions that write page tables.
UNMARKED = {INC, ADD, CMPXCHG16B, MOVQ_XMM, MOVLPS, MOVQ_MM, MOVUPS, MOVDQA, MOVAPS, MOVNTDQ}
KIND_READ, KIND_WRITE, KIND_FETCH = 0, 1, 2
ACCESS = (0, PF_W, PF_I)
DONE, PAGE_FAULT, DEVICE, PROTECTION, REFUSED = 0, 1, 2, 4, 9  # outcomes of an operation
END_FIXED, END_INJECTED, END_EMULATED, END_DEVICE = 0, 2, 3, 4  # ends of a fault
MOST_FAULTS = 200  # of one operation, before it counts as endless


def groups(rows):
    """The index of the first access of each access's instruction, or of the delivery of an exception."""
    start, out, own = 0, [], False
    for i, (kind, _, _, main, _) in enumerate(rows):
        if kind == KIND_FETCH or (own and kind == KIND_READ and rows[i - 1][3]):
            start = i
        own = own or bool(main)
        out.append(start)
    return out


class Guest:
    """One guest on `machine`, and its client; after `run` the fields say what became of the operation."""

    def __init__(self, machine, slots=()):
        self.machine, self.slots = machine, slots
        self.forget()

    def forget(self):
        self.outcome, self.error, self.loaded, self.devices, self.faults, self.log = DONE, 0, 0, 0, [], []

    def run(self, op, rows):
        """Do one operation (op, user, size, flags, addr, value, expected); its accesses are `rows`."""
        machine = self.machine
        self.forget()
        machine.select(op.flags >> 1)
        machine.ac = op.flags & 1
        if not rows:
            self.client(op)
            return
        starts = None
        machine.enter()
        registers = op.op in REGISTERS
        i = 0
        while i < len(rows):
            kind, user, size, main, va = rows[i]
            if main == 1:
                va = op.addr
            if i and registers:
                registers = False
                self.load(op)
            code, gpa = machine.access(va, ACCESS[kind] | (PF_U if user else 0))
            if code is None:
                if main:
                    self.native(op, main, kind, size, gpa, i + 1 < len(rows) and rows[i + 1][3])
                i += 1
                continue
            starts = starts or groups(rows)
            events = len(machine.events)
            done, end = self.fault(op, va, code, user, rows[starts[i]][4])
            machine.enter()
            if end == END_EMULATED and any(e[0] in (13, 14) for e in machine.events[events:]):
                end = END_DEVICE
            self.faults.append((i, code, end, va))
            if not done:
                i = starts[i]
                continue
            while main and self.outcome != PAGE_FAULT and i + 1 < len(rows) and rows[i + 1][3]:
                i += 1
            i += 1

    def client(self, op):
        """What the client does, beside the guest."""
        machine, code = self.machine, op.op
        if code == POKE:
            machine.poke(op.addr, op.value)
        elif code == HREAD:
            machine.peek(op.addr)
        elif code == DISCARD:
            machine.discard(op.addr, op.value)
        elif code == COLLAPSE:
            machine.collapse(op.addr, op.value)
        elif code == SLOT:
            self.fail(machine.set_slot(*self.slots[op.addr]))
        elif code == LOG:
            machine.set_log(op.addr, op.value)
        elif code == GETLOG:
            self.log = machine.get_log(op.addr) or []
            self.loaded = len(self.log)
        elif code == CLEARLOG:
            machine.clear_log(0, op.addr, op.value)

    def fail(self, errno):
        if errno:
            self.outcome, self.error = REFUSED, errno

    def load(self, op):
        """A register load or INVLPG."""
        try:
            self.machine.load(REGISTERS[op.op], op.addr if op.op == INVLPG else op.value)
        except GP:
            self.outcome = PROTECTION
        self.machine.enter()

    def fault(self, op, va, code, user, rip):
        """The exit of an access: whether the instruction is over, emulated or with an exception; the fault's end."""
        machine, end, done = self.machine, END_FIXED, False
        assert len(self.faults) < MOST_FAULTS, "the operation faults for ever"
        try:
            result = machine.page_fault(va, code)
            if result in (EMULATE, DEVICE_ACCESS):
                end = END_EMULATED
                done = self.emulate(op, va, user, rip, result is EMULATE)
        except Fault as fault:
            end = end or END_INJECTED
            self.outcome, self.error, done = PAGE_FAULT, fault.code, True
        return done, end

    def emulate(self, op, va, user, rip, protected):
        """Whether the emulator did the instruction; otherwise it is to run again."""
        machine, size = self.machine, op.size
        user = PF_U if user else 0
        rip = va if op.op == FETCH else rip
        if machine.emulation(rip, va, user, protected, op.op not in UNMARKED):
            return False
        old = 0
        if op.op in READ_FIRST or op.op == READ:
            gpa = machine.translate(op.addr, user)
            if machine.is_device(gpa, False):
                self.device()
                old = (1 << 8 * size) - 1
            else:
                old = machine.read(gpa, size)
            self.see(op, old)
        if op.op != READ:
            new = self.result(op, old)
            first = min(size, -op.addr & 4095 or size)  # bytes on the first page
            for va, n, shift in (op.addr, first, 0), (op.addr + first, size - first, 8 * first):
                if not n:
                    break
                gpa = machine.translate(va, PF_W | user)
                if machine.is_device(gpa, True):
                    self.device()
                else:
                    machine.store(gpa, new >> shift & (1 << 8 * n) - 1, n)
        return True

    def device(self):
        self.devices += 1
        self.outcome = DEVICE

    def native(self, op, main, kind, size, gpa, more):
        """The processor's own access to memory. A store waits for the last access of the instruction."""
        if kind == KIND_FETCH:
            return
        self.places = [] if main == 1 else self.places
        self.places.append((gpa, size))
        if more:
            return
        old = self.machine.read(gpa, size) if op.op in READ_FIRST or op.op == READ else 0
        self.see(op, old)
        if op.op != READ:
            new = self.result(op, old)
            for gpa, n in self.places:
                self.machine.write(gpa, new & (1 << 8 * n) - 1, n)
                new >>= 8 * n

    def see(self, op, old):
        """What the instruction loads: all of it, or what is in (E/R)AX in the end."""
        if op.op in (READ, XCHG, CMPXCHG):
            self.loaded = old
        elif op.op in (CMPXCHG8B, CMPXCHG16B):
            self.loaded = old & (1 << 4 * op.size) - 1

    def result(self, op, old):
        """What the instruction leaves in memory that held `old`."""
        if op.op in COMPARE:
            return op.value if old == op.expected else old
        if op.op in STORE:
            return op.value & (1 << 8 * op.size) - 1
        return {ANDB: old & op.value, OR: old | op.value, INC: old + 1, ADD: old + op.value}[op.op] & (
            1 << 8 * op.size
        ) - 1
