"""Where a linear address leads: what a walk without side effect found, as Python sees it."""
from cython cimport freelist

from shadowcore.engine.types cimport ACC_U, ACC_W, ACC_X, MODE_32, MODE_OFF
from shadowcore.engine.walker cimport sc_walk, walk_index

from shadowcore.errors import ConfigError


@freelist(8)
cdef class Translation:
    """Where a linear address leads now, found without any side effect.

    gpa: int. page_size: bytes. writable, user, executable: rights of the whole walk (SDM volume 3, 4.6.1).
    entry: the guest's leaf entry. level: its level. levels: (level, gpa of the entry, entry) from the top. With paging
    off there are no entries.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> cpu.translate(0x401000)
    Translation(gpa=0x201000, page_size=4096, rights=rw--)
    """

    @property
    def gpa(self) -> int:
        return self.w.gpa

    @property
    def page_size(self) -> int:
        if self.mode == MODE_OFF:
            return 4096
        if self.mode == MODE_32:
            return 4096 if self.w.level == 1 else 4 << 20
        return 1 << (12 + 9 * (self.w.level - 1))

    @property
    def writable(self) -> bool:
        return self.w.access & ACC_W != 0

    @property
    def user(self) -> bool:
        return self.w.access & ACC_U != 0

    @property
    def executable(self) -> bool:
        return self.w.access & ACC_X != 0

    @property
    def entry(self) -> int:
        return 0 if self.mode == MODE_OFF else self.w.entry[self.w.level]

    @property
    def level(self) -> int:
        return 0 if self.mode == MODE_OFF else self.w.level

    @property
    def levels(self) -> list:
        return [] if self.mode == MODE_OFF else walk_levels(&self.w)

    def __reduce__(self):
        return _pickled_translation, (self.mode, self.w)

    def _repr_html_(self):
        from shadowcore.engine.shown import translation_html
        return translation_html(self, self.w.pte_size)

    def __repr__(self):
        rights = "r" + "-w"[self.writable] + "-x"[self.executable] + "-u"[self.user]
        return f"Translation(gpa={self.gpa:#x}, page_size={self.page_size}, rights={rights})"


def _pickled_translation(int mode, sc_walk w):
    """A Translation of these fields. ConfigError for what is none."""
    cdef Translation made = Translation.__new__(Translation)
    if not 0 <= w.level <= w.top <= 5 or w.pte_size not in (4, 8):
        raise ConfigError("Translation: a pickle of a walk that cannot be")
    made.mode, made.w = mode, w
    return made


cdef list walk_levels(const sc_walk *w):
    cdef int level = w.top
    cdef list found = []
    while level >= w.level and level > 0:
        found.append((level, (w.table[level] << 12) + walk_index(w, level) * w.pte_size, w.entry[level]))
        level -= 1
    return found
