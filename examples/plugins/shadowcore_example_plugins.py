"""What a package adds to shadowcore: a policy of replacement, and decisions about stores to guest tables."""

import json

import shadowcore as sc


class LeastFrequentlyUsed(sc.Policy):
    """Recycles the page that was used least often; among equals the one that was made first."""

    def __init__(self):
        self.uses = {}

    def made(self, page):
        self.uses[page] = 0

    def used(self, page):
        self.uses[page] += 1

    def gone(self, page):
        del self.uses[page]

    def victim(self):
        free = [page for page in self.uses if self.pages["root_count"][page] == 0]
        return min(free, key=self.uses.__getitem__, default=None)

    def state(self):
        return json.dumps(list(self.uses.items())).encode()

    def restore(self, state):
        uses = {int(page): int(count) for page, count in json.loads(state)}
        if any(self.pages["active"][page] == 0 for page in uses) or len(uses) != sum(self.pages["active"] != 0):
            raise ValueError("these are not the pages that there are")
        self.uses = uses


class Patient(sc.Decisions):
    """Emulates stores to a table until there have been eight, then lets the guest store by itself."""

    def __init__(self):
        self.stores = {}

    def store(self, table):
        if table.unsync:
            return "unsync"
        count = self.stores[table.gfn] = self.stores.get(table.gfn, 0) + 1
        if count % 8:
            return "emulate"
        return "unprotect"

    def state(self):
        return json.dumps(list(self.stores.items())).encode()

    def restore(self, state):
        self.stores = {int(gfn): int(count) for gfn, count in json.loads(state)}
