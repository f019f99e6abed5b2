"""Slow models of replacement policies, from their papers, over sets, lists and dicts: no code of the engine's.

Each has `ask(key)`: True if the key was there; afterwards it is.
"""

from collections import OrderedDict


class Fifo:
    def __init__(self, size):
        self.size, self.queue = size, []

    def ask(self, key):
        if key in self.queue:
            return True
        if len(self.queue) == self.size:
            self.queue.pop(0)
        self.queue.append(key)
        return False


class Lru:
    def __init__(self, size):
        self.size, self.queue = size, OrderedDict()

    def ask(self, key):
        found = key in self.queue
        if not found and len(self.queue) == self.size:
            self.queue.popitem(last=False)
        self.queue[key] = None
        self.queue.move_to_end(key)
        return found


class Clock:
    """Corbató: a circle, a hand, a bit."""

    def __init__(self, size):
        self.size, self.circle, self.hand = size, [], 0

    def ask(self, key):
        for entry in self.circle:
            if entry[0] == key:
                entry[1] = True
                return True
        if len(self.circle) < self.size:
            self.circle.append([key, False])
            return False
        while self.circle[self.hand][1]:
            self.circle[self.hand][1] = False
            self.hand = (self.hand + 1) % self.size
        self.circle[self.hand] = [key, False]
        self.hand = (self.hand + 1) % self.size
        return False


class Sieve:
    """Zhang and others, NSDI 2024, figure 3. The list has the newest first."""

    def __init__(self, size):
        self.size, self.queue, self.visited, self.hand = size, [], set(), None

    def ask(self, key):
        if key in self.queue:
            self.visited.add(key)
            return True
        if len(self.queue) == self.size:
            at = len(self.queue) - 1 if self.hand is None else self.queue.index(self.hand)
            while self.queue[at] in self.visited:
                self.visited.remove(self.queue[at])
                at = at - 1 if at else len(self.queue) - 1
            self.hand = self.queue[at - 1] if at else None
            del self.queue[at]
        self.queue.insert(0, key)
        return False


class TwoQ:
    """Johnson and Shasha, VLDB 1994: the full version, Kin a quarter, Kout a half."""

    def __init__(self, size):
        self.size, self.a1in, self.a1out, self.am = size, [], [], []

    def ask(self, key):
        if key in self.am:
            self.am.remove(key)
            self.am.append(key)
            return True
        if key in self.a1in:
            return True
        if len(self.am) + len(self.a1in) == self.size:
            if len(self.a1in) > self.size // 4 or not self.am:
                self.a1out.append(self.a1in.pop(0))
                if len(self.a1out) > self.size // 2:
                    self.a1out.pop(0)
            else:
                self.am.pop(0)
        # A key that left Aout only just now, for the room that it needed itself, is new.
        if key in self.a1out:
            self.a1out.remove(key)
            self.am.append(key)
        else:
            self.a1in.append(key)
        return False


class Arc:
    """Megiddo and Modha, FAST 2003, figure 4. Lists have the most recently used last."""

    def __init__(self, size):
        self.c, self.p = size, 0
        self.t1, self.t2, self.b1, self.b2 = [], [], [], []

    def replace(self, in_b2):
        if (self.t1 and (len(self.t1) > self.p or (in_b2 and len(self.t1) == self.p))) or not self.t2:
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def ask(self, key):
        for queue in (self.t1, self.t2):
            if key in queue:
                queue.remove(key)
                self.t2.append(key)
                return True
        full = len(self.t1) + len(self.t2) == self.c
        if key in self.b1:
            self.p = min(self.c, self.p + max(len(self.b2) / len(self.b1), 1))
            if full:
                self.replace(False)
            self.b1.remove(key)
            self.t2.append(key)
        elif key in self.b2:
            self.p = max(0, self.p - max(len(self.b1) / len(self.b2), 1))
            if full:
                self.replace(True)
            self.b2.remove(key)
            self.t2.append(key)
        else:
            if len(self.t1) + len(self.b1) == self.c:
                if len(self.t1) < self.c:
                    self.b1.pop(0)
                    if full:
                        self.replace(False)
                else:
                    self.t1.pop(0)
            elif full:
                if len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2) >= 2 * self.c:
                    self.b2.pop(0)
                self.replace(False)
            self.t1.append(key)
        return False


class S3Fifo:
    """Yang and others, SOSP 2023, algorithm 1, with the thresholds of its authors' simulator: two uses to move on, and
    while the pool was never full, what the small queue has no room for goes to the main one."""

    def __init__(self, size):
        self.size, self.small, self.main, self.ghosts, self.uses = size, [], [], [], {}
        self.small_size, self.ghost_size, self.was_full = max(1, size // 10), int(size * 0.9), False

    def ask(self, key):
        if key in self.uses:
            self.uses[key] = min(3, self.uses[key] + 1)
            return True
        known = key in self.ghosts
        if known:
            self.ghosts.remove(key)
        while len(self.uses) == self.size:
            self.was_full = True
            if self.small and len(self.main) <= self.size - self.small_size:
                self.leave_small()
            else:
                self.leave_main()
        if known or (not self.was_full and len(self.small) >= self.small_size):
            self.main.append(key)
        else:
            self.small.append(key)
        self.uses[key] = 0
        return False

    def leave_small(self):
        while self.small:
            key = self.small.pop(0)
            if self.uses[key] < 2:
                del self.uses[key]
                if len(self.ghosts) == self.ghost_size:
                    self.ghosts.pop(0)
                self.ghosts.append(key)
                return
            self.uses[key] = 0
            self.main.append(key)

    def leave_main(self):
        while self.main:
            key = self.main.pop(0)
            if not self.uses[key]:
                del self.uses[key]
                return
            self.uses[key] -= 1
            self.main.append(key)


class Lirs:
    """Jiang and Zhang, SIGMETRICS 2002; a hundredth of the pool for HIR pages, a stack of at most twice the pool, from
    which the non-resident pages go that were evicted first. Lists have the most recent last."""

    def __init__(self, size):
        self.size, self.hirs = size, max(1, size // 100)
        self.lirs = size - self.hirs
        self.stack, self.queue, self.lir, self.gone = [], [], set(), []

    def prune(self):
        while len(self.stack) > 1 and self.stack[0] not in self.lir:
            key = self.stack.pop(0)
            if key in self.gone:
                self.gone.remove(key)

    def top(self, key):
        if key in self.stack:
            self.stack.remove(key)
        self.stack.append(key)

    def demote(self):
        key = next(key for key in self.stack if key in self.lir)
        self.lir.remove(key)
        self.stack.remove(key)
        self.queue.append(key)
        self.prune()

    def promote(self, key):
        while len(self.lir) + 1 > self.lirs:
            self.demote()
        self.lir.add(key)

    def ask(self, key):
        found = key in self.lir or key in self.queue
        if key in self.lir:
            self.top(key)
            self.prune()
        elif key in self.queue:
            self.queue.remove(key)
            if key in self.stack:
                self.top(key)
                self.promote(key)
                self.prune()
            else:
                self.top(key)
                self.queue.append(key)
        else:
            if len(self.lir) + len(self.queue) == self.size:
                victim = self.queue.pop(0)
                if victim in self.stack:
                    self.gone.append(victim)
            if key in self.gone:
                self.gone.remove(key)
                self.top(key)
                self.promote(key)
                self.prune()
            elif len(self.lir) < self.lirs:
                self.top(key)
                self.lir.add(key)
                self.prune()
            else:
                self.top(key)
                self.queue.append(key)
        while len(self.stack) > 2 * self.size and self.gone:
            self.stack.remove(self.gone.pop(0))
        return found


class Optimal:
    """Belady, 1966. `to_come`: the whole string, of which each key is asked in turn."""

    def __init__(self, size, to_come):
        self.size, self.to_come, self.now, self.there = size, list(to_come), 0, set()

    def ask(self, key):
        self.now += 1
        if key in self.there:
            return True
        if len(self.there) == self.size:
            rest = self.to_come[self.now :]
            self.there.remove(max(self.there, key=lambda key: rest.index(key) if key in rest else len(rest)))
        self.there.add(key)
        return False


MODELS = {
    "fifo": Fifo,
    "lru": Lru,
    "clock": Clock,
    "2q": TwoQ,
    "arc": Arc,
    "lirs": Lirs,
    "sieve": Sieve,
    "s3-fifo": S3Fifo,
}
