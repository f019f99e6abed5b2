"""What notebooks show of a machine's parts: a screen, addresses in hexadecimal."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import notebook

_ADDRESS = 0x000F_FFFF_FFFF_F000
_P, _PS = 1, 1 << 7


def mmu_html(mmu: Any) -> str:
    """The shadow pages of an Mmu as a tree: under each page those that its entries link; roots in use first."""
    rows = {int(row["page"]): row for row in mmu.pages}
    labels, below, linked = {}, {}, set()
    for page, row in rows.items():
        words = [f"gfn {int(row['gfn']):#x}", f"level {int(row['level'])}", f"{int(row['present'])} entries"]
        words += [word for name, word in (("direct", "direct"), ("unsync", "unsync")) if row[name]]
        words += [f"root count {int(row['root_count'])}"] if row["root_count"] else []
        labels[page] = f"page {page}: {', '.join(words)}"
        entries = mmu.table(page) if row["level"] > 1 else np.zeros(0, np.uint64)
        links = entries[(entries & np.uint64(_P | _PS)) == _P] & np.uint64(_ADDRESS)
        children = [(int(link) - mmu.memory.pool_hpa) >> 12 for link in links.tolist()]
        below[page] = [child for child in dict.fromkeys(children) if child in rows]
        linked.update(below[page])
    roots = sorted(rows, key=lambda page: (not rows[page]["root_count"], page))
    tops = [page for page in roots if rows[page]["root_count"] or page not in linked]
    title = f"{mmu.design.name}: {len(rows):,} shadow pages in use, {mmu.pages_free:,} free"
    return notebook.tree(title, labels, below, tops)


def translation_html(found: Any, entry_size: int) -> str:
    """A Translation: each entry of the walk, and what it came to."""
    digits = 2 + 2 * entry_size
    rows = [(f"level {level}", f"{gpa:#x}", f"{entry:#0{digits}x}") for level, gpa, entry in found.levels]
    rights = ", ".join(
        (
            "read and write" if found.writable else "read only",
            "user" if found.user else "supervisor only",
            "executable" if found.executable else "not executable",
        )
    )
    rows.append(("page", f"{found.gpa:#x}", f"{found.page_size >> 10:,} KiB: {rights}"))
    return notebook.table("Translation", ("", "gpa", "entry"), rows)
