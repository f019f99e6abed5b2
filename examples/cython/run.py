"""A linked list that visits every page of a guest once, chased twice: cold, then with the shadow filled."""

import numpy as np
from chase import chase

import shadowcore as sc

PAGES = 512
START = 0x400000

vm = sc.VM("8MiB", "cached")
tables = sc.PageTables(vm.memory, "64", allocate=range(16, 64))
tables.map(START, 0x200000, PAGES * 4096, "rwu")
for name, value in tables.registers.items():
    setattr(vm.vcpus[0], name, value)

order = np.random.default_rng(1).permutation(PAGES)
order = np.concatenate([[0], order[order != 0]])
for page, following in zip(order, [*order[1:], None], strict=True):
    link = 0 if following is None else START + 4096 * int(following)
    vm.memory.words[(0x200000 + 4096 * int(page)) // 8] = link

for name in ("cold", "warm"):
    done, end, exits, outcome = chase(vm, START, 10_000)
    print(f"{name}: {done} links, {exits} exits, ended at {end:#x}, outcome {outcome}")
