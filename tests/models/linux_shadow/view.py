"""What can be seen of the shadow MMU from outside."""

from kvmbits import DEV, HW, MW, PS, A, D, G


def generation_bits(generation):
    """What shows of it in a device entry: its low bits lie at places 3 to 10 of the real entry."""
    return generation << 2 & (A | D | PS) | generation << 1 & (HW | MW) | (G if generation >> 5 & 1 else 0)


class View:
    """The part of the MMU that shows its state."""

    def page(self, frame):
        """The bytes of a frame of the client."""
        return bytes(self.ram[frame << 12 : frame + 1 << 12])

    def counters(self):
        """All counters by name; those of processor n > 0 as "n:name"."""
        self.vcpus[self.vcpu] = self.of_vcpu()
        return self.c | {
            (f"{n}:" if n else "") + name: count for n, v in enumerate(self.vcpus) for name, count in v["own"].items()
        }

    def dump(self):
        """The state as plain values: pages newest first, and everything else by page number in that list."""
        pages = list(reversed(self.active))
        number = {id(sp): i for i, sp in enumerate(pages)}

        def named(sp):
            return 65535 if sp is None else number.get(id(sp), 65534)

        def state(v):
            return {
                "gen": self.valid_gen,
                "used_pages": self.used,
                "indirect_pages": self.indirect,
                "root_role": v["root_role"],
                "cpu_role": v["cpu_role"],
                "pgd": v["pgd"],
                "root": 65534 if v["pae"] is not None else named(v["root"]),
                "prev_root": tuple(named(sp) for sp, _ in v["prev"]),
                "prev_pgd": tuple(pgd for _, pgd in v["prev"]),
                "pae_root": (65535,) * 4 if v["pae"] is None else tuple(map(named, v["pae"])),
            }

        self.vcpus[self.vcpu] = self.of_vcpu()
        sptes, mapped = {}, ({}, {}, {}, {})
        for p, sp in enumerate(pages):
            for i, s in enumerate(sp.spt):
                if not s:
                    continue
                if s & DEV:
                    sptes[p, i] = s & 0xFFFF | generation_bits(s >> 16), sp.gfns[i], None
                elif sp.level == 1 or s & PS:
                    sptes[p, i] = s, self.index_gfn(sp, i), None if sp.direct else sp.acc[i]
                    mapped[sp.level].setdefault(self.index_gfn(sp, i), set()).add((sp, i))
                else:
                    sptes[p, i] = s, number[id(sp.kids[i])], None
        histogram = []
        for level in (1, 2, 3):
            assert mapped[level] == {gfn: entries for gfn, entries in self.rmap[level].items() if entries}
            counts = [sum(slot.regions(level) for slot in self.slots.values()) - len(mapped[level])] + [0] * 10
            for entries in mapped[level].values():  # by the lowest set bit of the number
                counts[(len(entries) & -len(entries)).bit_length()] += 1
            histogram.append(counts)
        return {
            "pages": [(sp.gfn, sp.role, sp.roots, sp.children, sp.flood, int(sp.unsync), sp.gen) for sp in pages],
            "sptes": sptes,
            "unsync_bits": sorted((p, i) for p, sp in enumerate(pages) for i in range(512) if sp.bitmap >> i & 1),
            "rmap_hist": histogram,
            "states": [state(v) for v in self.vcpus],
        }
