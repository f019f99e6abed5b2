"""The curve of `shadowcore pool` as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..studies.pools import PoolStudy


def draw_pools(found: PoolStudy, file: str) -> None:
    """Exits over shadow pages, as SVG. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "shadowcore", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        pages = [point.pages for point in found.points]
        axes.loglog(
            pages, [point.exits for point in found.points], "o-", color="#0b5cad", markersize=3.5, label="exits"
        )
        axes.axhline(found.endless.exits, color="#888888", linewidth=0.8, linestyle="--", label="an endless pool")
        for share, smallest in found.within.items():
            axes.axvline(smallest, color="#c05000", linewidth=0.8, linestyle=":")
            axes.annotate(
                f"{smallest:,} pages: {share:.0%}",
                (smallest, axes.get_ylim()[1]),
                rotation=90,
                va="top",
                ha="right",
                fontsize=7,
                color="#c05000",
            )
        axes.set_xlabel("shadow pages in the pool")
        axes.set_ylabel("exits")
        axes.set_title(f"{found.workload} under {found.design}", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})
