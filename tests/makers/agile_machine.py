"""Guests that store to their own tables, for the tests of agile paging."""

import shadowcore as sc

PAGE, MIB = 4096, 1 << 20
RAM = 16 * MIB
VA, DEVICE, DIRECT = 0x4000_0000, 0x4100_0000, 0x8000_0000
PAGES = 48
MODES = ["32", "pae", "64", "la57"]


class AgileMachine:
    """Pages at VA, some of RAM, and all of memory at DIRECT for the guest's own stores to its tables."""

    def __init__(self, mmu, mode="64", backing="warm", **more):
        self.vm = sc.VM([sc.MemorySlot(0, RAM)], mmu, backing=backing, **more)
        self.tables = sc.PageTables(self.vm, mode, allocate=range(1024, 2048))
        self.rights = ["rwxu", "rwx", "rxu", "rx"] if mode == "32" else ["rwxu", "rw", "ru", "r"]
        for i in range(PAGES):
            self.tables.map(VA + i * PAGE, (i * 7 % 64) * PAGE, PAGE, self.rights[i % 4], PAGE)
        self.tables.map(DEVICE, 64 * MIB, 4 * PAGE, "rwxu", PAGE)
        self.tables.map(DIRECT, 0, RAM, "rwx" if mode == "32" else "rw", PAGE)
        self.size = self.tables.format.entry_size
        self.long = mode in ("64", "la57")
        for cpu in self.vm.vcpus:
            self.tables.activate(cpu)

    @property
    def cpu(self):
        return self.vm.vcpus[0]

    def entry(self, va, level=1):
        return self.tables.entry(va, level)

    def store(self, va, value, level=1, cpu=None):
        """The guest stores `value` to the entry of `level` for va, by its direct map."""
        (cpu or self.cpu).write(DIRECT + self.entry(va, level).gpa, value, self.size)

    def touch(self, va=VA, level=1):
        """The guest stores to the entry what it holds."""
        self.store(va, self.entry(va, level).value, level)

    @property
    def nested(self):
        """gfns of the tables that the processor walks itself."""
        pages = self.vm.mmu.pages
        return sorted({int(row["gfn"]) for row in pages[pages["nested"] == 1]})

    def table(self, va=VA, level=1):
        return self.entry(va, level).gpa >> 12
