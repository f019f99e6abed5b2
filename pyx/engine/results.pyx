"""What a batch of operations came to: arrays with a row for each operation.

Most operations only lead somewhere. What else can be said of one (a fault, exits, emulation) is kept as a short list
by the engine, and becomes arrays when they are asked for.
"""
import numpy as np

from cpython.buffer cimport PyBuffer_FillInfo
from cython cimport freelist
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from shadowcore.engine.counters cimport Stats, stats_between
from shadowcore.engine.results cimport sc_row

from shadowcore.errors import ConfigError

cdef enum:
    SPARES = 8                      # blocks kept for the next batch, whose first touch would cost page faults
    SPARE_BYTES = 8 << 20           # the largest that is kept

# sc_row.
_ROW = np.dtype([("number", "<u8"), ("error_code", "<u2"), ("exits", "<u2"), ("outcome", "u1"), ("emulated", "u1"),
                 ("pad", "<u2")])
assert _ROW.itemsize == sizeof(sc_row)

cdef void *_spare[SPARES]
cdef size_t _spare_size[SPARES]
memset(_spare_size, 0, sizeof(_spare_size))


@freelist(8)
cdef class Block:
    """Bytes that arrays look into. Those of freed blocks serve again."""

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.at, self.size, 0, flags)

    def __dealloc__(self):
        cdef int i
        if self.at == NULL:
            return
        if 4096 < self.size <= SPARE_BYTES:
            for i in range(SPARES):
                if _spare_size[i] == 0:
                    _spare[i] = self.at
                    _spare_size[i] = self.size
                    return
        free(self.at)


cdef Block block_new(size_t size):
    """A block of at least `size` bytes, with whatever is in them. MemoryError where there is no room."""
    cdef Block block = Block.__new__(Block)
    cdef int i
    if size > 4096:
        for i in range(SPARES):
            if size <= _spare_size[i] <= 2 * size:
                block.at, block.size = _spare[i], _spare_size[i]
                _spare_size[i] = 0
                return block
    block.at = malloc(size if size else 1)
    if block.at == NULL:
        raise MemoryError(f"{size} bytes for the results of a batch")
    block.size = size
    return block


_COLUMNS = ("outcome", "error_code", "gpa", "value", "exits", "emulated")
_OUTCOMES = {0: "done", 1: "guest page faults", 2: "guest general protection faults", 3: "device accesses",
             6: "undefined instructions"}


@freelist(8)
cdef class RunResult:
    """One row per operation, in arrays of equal length.

    outcome: uint8: 0 done, 1 guest #PF, 2 #GP, 3 MMIO (nothing was transferred), 6 #UD. error_code: uint16, of a #PF.
    gpa: uint64: where the access led; all ones if nowhere. value: uint64: what a load or fetch read.
    exits: uint16: page-fault exits it took. emulated: uint8: stores that the emulator did.
    value_high: uint64, upper half of 16-byte values; None when no operation has that size.
    stats: the difference that the run made to the VM's counters.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> ops = np.zeros(3, sc.OP_DTYPE)
    >>> ops["addr"] = 0x400000, 0x400008, 0x500000
    >>> ops["size"] = 8
    >>> result = cpu.run(ops)
    >>> result.outcome.tolist(), result.exits.tolist()
    ([0, 0, 1], [1, 0, 1])
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("results are made by VCpu.run")

    cdef object _sparse(self, name):
        """The column `name` of the rows, and 0 for all operations that have none."""
        if self.columns is None:
            self.columns = {}
        if name not in self.columns:
            rows = np.frombuffer((<const char *>self.rows)[:self.n_rows * sizeof(sc_row)], _ROW)
            column = self.columns[name] = np.zeros(self.n, _ROW[name])
            column[rows["number"]] = rows[name]
        return self.columns[name]

    cdef object _dense(self, name, int part):
        if self.columns is None:
            self.columns = {}
        if name not in self.columns:
            self.columns[name] = (np.zeros(self.n, dtype=np.uint64) if part < 0 or self.words is None else np.ndarray(
                self.n, dtype=np.uint64, buffer=self.words, offset=8 * part * self.capacity))
        return self.columns[name]

    @property
    def outcome(self):
        """uint8[n]: 0 done, 1 guest #PF, 2 #GP, 3 MMIO."""
        return self._sparse("outcome")

    @property
    def error_code(self):
        """uint16[n]: of a #PF (SDM volume 3, 4.7)."""
        return self._sparse("error_code")

    @property
    def exits(self):
        """uint16[n]: page-fault exits."""
        return self._sparse("exits")

    @property
    def emulated(self):
        """uint8[n]: stores that the emulator did."""
        return self._sparse("emulated")

    @property
    def gpa(self):
        """uint64[n]: where the access led; all ones if nowhere."""
        return self._dense("gpa", 0)

    @property
    def value(self):
        """uint64[n]: what a load or fetch read."""
        return self._dense("value", 1 if self.data else -1)

    @property
    def value_high(self):
        """uint64[n]: the upper half of 16-byte values; None when no operation has that size."""
        return self._dense("value_high", 1 + self.data) if self.wide else None

    @property
    def stats(self) -> Stats:
        if self.columns is None:
            self.columns = {}
        if "stats" not in self.columns:
            self.columns["stats"] = stats_between(&self.before, &self.after)
        return self.columns["stats"]

    def __reduce__(self):
        rows = np.frombuffer((<const char *>self.rows)[:self.n_rows * sizeof(sc_row)], _ROW)
        words = [self._dense("gpa", 0)]
        if self.data:
            words.append(self._dense("value", 1))
        if self.wide:
            words.append(self._dense("value_high", 1 + self.data))
        return _pickled_result, (bool(self.data), bool(self.wide), np.stack(words), rows, self.stats)

    def __len__(self):
        return self.n

    def to_pandas(self):
        """The arrays as columns of a pandas.DataFrame, one row per operation. ConfigError where there is no pandas."""
        from shadowcore.notebook import pandas
        columns = {name: getattr(self, name) for name in _COLUMNS}
        if self.value_high is not None:
            columns["value_high"] = self.value_high
        return pandas().DataFrame(columns)

    def _repr_html_(self):
        from shadowcore.notebook import table
        outcome = self.outcome
        rows = [(name, f"{int(np.count_nonzero(outcome == code)):,}") for code, name in _OUTCOMES.items()]
        rows.append(("page-fault exits", f"{int(self.exits.sum()):,}"))
        rows.append(("emulated stores", f"{int(self.emulated.sum()):,}"))
        return table(f"RunResult: {len(self):,} operations", ("", "count"), rows)

    def __repr__(self):
        faults = int(np.count_nonzero(self.outcome == 1))
        return (
            f"RunResult({len(self)} operations, {int(self.exits.sum())} page-fault exits, "
            f"{int(self.emulated.sum())} emulated stores, {faults} guest faults)"
        )


def _pickled_result(bint data, bint wide, words, rows, Stats stats not None):
    """A RunResult of gpas, values where bytes moved, upper halves of wide ones (rows of `words`), and of what else
    there is to say of some operations. ConfigError for what is none."""
    cdef RunResult made = RunResult.__new__(RunResult)
    words, rows = np.array(words, dtype=np.uint64), np.array(rows, dtype=_ROW)      # whatever they were made of
    if words.ndim != 2 or words.shape[0] != 1 + data + wide or rows.ndim != 1 or (
            rows.size and rows["number"].max() >= words.shape[1]):
        raise ConfigError("RunResult: a pickle whose arrays do not fit each other")
    made.n = made.capacity = words.shape[1]
    made.data, made.wide = data, wide
    made.words = block_new(words.nbytes)
    made.many = block_new(rows.nbytes)
    made.rows = <sc_row *>made.many.at
    made.n_rows = rows.size
    np.ndarray(words.shape, np.uint64, made.words)[...] = words
    np.ndarray(rows.shape, _ROW, made.many)[...] = rows
    made.after = stats.c[0]
    return made
