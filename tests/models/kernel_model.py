"""What processes should see in their memory: an independent model of mmap, fork, files and the rest, word by word.

No page tables, no frames: an address space is a dict of pages, each of which is a cell that several may share.
"""

PAGE = 4096
M64 = (1 << 64) - 1


def disk(file: int, page: int, word: int) -> int:
    """What a file of the guest holds: the finalizer of MurmurHash3 of its place."""
    x = (file + 1) << 40 | page << 9 | word
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & M64
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 & M64
    return x ^ x >> 33


class Cell:
    """A page of memory: words that were stored, over a background."""

    def __init__(self, background=None, words=None):
        self.background = background  # (file, page), or None for zeros
        self.words = dict(words or {})

    def load(self, word):
        if word in self.words:
            return self.words[word]
        return 0 if self.background is None else disk(*self.background, word)

    def copy(self):
        return Cell(self.background, self.words)


class Files:
    """Pages of files as the page cache has them: shared mappings and private ones that were not written see them."""

    def __init__(self):
        self.cells = {}

    def cell(self, file, page):
        key = (file.number, page)
        if key not in self.cells:
            self.cells[key] = Cell(None if file.zero else key)
        return self.cells[key]


class Model:
    """An address space. Addresses are multiples of 8, accesses of 8 bytes; page -> [prot, file, page of it, shared]."""

    def __init__(self, files):
        self.files = files
        self.maps = {}
        self.own = {}  # pages that this process has written, private

    def map(self, addr, length, prot, file=None, page=0, shared=False):
        for i in range(-(-length // PAGE)):
            self.maps[addr // PAGE + i] = [prot, file, page + i, shared]
            self.own.pop(addr // PAGE + i, None)

    def unmap(self, addr, length):
        for i in range(-(-length // PAGE)):
            self.maps.pop(addr // PAGE + i, None)
            self.own.pop(addr // PAGE + i, None)

    def mapped(self, addr, length):
        return all(addr // PAGE + i in self.maps for i in range(-(-length // PAGE)))

    def protect(self, addr, length, prot):
        for i in range(-(-length // PAGE)):
            self.maps[addr // PAGE + i][0] = prot

    def fork(self):
        child = Model(self.files)
        child.maps = {number: list(what) for number, what in self.maps.items()}
        child.own = {number: cell.copy() for number, cell in self.own.items()}
        return child

    def load(self, addr):
        """The word at `addr`, or None where a load is refused."""
        number, word = addr // PAGE, addr % PAGE // 8
        if number not in self.maps or not self.maps[number][0]:
            return None
        _, file, page, _ = self.maps[number]
        if number in self.own:
            return self.own[number].load(word)
        if file is None:
            return 0
        return None if page >= file.pages else self.files.cell(file, page).load(word)

    def store(self, addr, value):
        """Whether the store was done."""
        number, word = addr // PAGE, addr % PAGE // 8
        if number not in self.maps or not self.maps[number][0] & 2:
            return False
        _, file, page, shared = self.maps[number]
        if file is not None and page >= file.pages:
            return False
        if shared:
            self.files.cell(file, page).words[word] = value
            return True
        if number not in self.own:
            self.own[number] = Cell() if file is None else self.files.cell(file, page).copy()
        self.own[number].words[word] = value
        return True
