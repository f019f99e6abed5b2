"""Draws the picture of docs/guide.md, what shadow paging is: python docs/make_concepts.py"""

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 900, 470
STYLE = """
text { font: 14px system-ui, "Segoe UI", "DejaVu Sans", Arial, sans-serif; fill: #222; }
.title { font-weight: 600; } .small { font-size: 12px; fill: #444; }
.guest { fill: #e8f1fa; stroke: #0072b2; } .shadow { fill: #fdf0e2; stroke: #d55e00; }
.memory { fill: #eef5ee; stroke: #117733; } .cpu { fill: #f3f3f3; stroke: #555; } .entry { fill: #fff; }
.arrow { fill: none; stroke: #222; stroke-width: 1.4; marker-end: url(#head); }
.exit { fill: none; stroke: #cc3311; stroke-width: 1.8; stroke-dasharray: 6 3; marker-end: url(#hot); }
.hot { fill: #a82a0d; }
"""


class Drawing:
    """Boxes, texts and arrows, each a line of SVG."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def box(self, kind: str, x: float, y: float, width: float, height: float, title: str = "") -> None:
        self.lines.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>')
        if title:
            self.text(x + 10, y + 20, title, "title")

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        of = f' class="{kind}"' if kind else ""
        self.lines.append(f'<text{of} x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>')

    def table(self, kind: str, x: float, y: float, title: str, entries: tuple[str, ...]) -> None:
        """A paging structure of four entries."""
        self.text(x, y - 6, title, "small")
        for number, entry in enumerate(entries):
            self.lines.append(f'<rect class="{kind} entry" x="{x}" y="{y + 20 * number}" width="96" height="20"/>')
            self.text(x + 48, y + 20 * number + 14.5, entry, "small", "middle")

    def arrow(self, path: str, kind: str = "arrow") -> None:
        self.lines.append(f'<path class="{kind}" d="{path}"/>')

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
            for name, colour in (("head", "#222"), ("hot", "#cc3311"))
        )
        label = "The guest's tables, the shadow tables that the processor walks, and the exits between them"
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"',
                f'aria-label="{label}">',
                f"<defs>{heads}</defs><style>{STYLE}</style>",
                f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
                *self.lines,
                "</svg>\n",
            )
        )


def draw() -> str:
    picture = Drawing()
    picture.box("guest", 20, 20, 560, 170, "Guest: tables that its kernel writes (gva to gpa)")
    picture.table("guest", 60, 78, "root, named by CR3", ("", "gpa of table", "", ""))
    picture.table("guest", 240, 78, "table", ("gpa, rw", "", "gpa, r", ""))
    picture.table("guest", 440, 78, "data, at a gpa", ("", "", "", ""))
    picture.arrow("M156 108 C190 108 200 88 238 88")
    picture.arrow("M336 88 L438 88")
    picture.box("shadow", 20, 260, 560, 170, "Shadow MMU: pool of shadow pages (gva to hpa)")
    picture.table("shadow", 60, 318, "shadow page of the root", ("", "hpa of page", "", ""))
    picture.table("shadow", 240, 318, "shadow page of the table", ("hpa, rw", "", "not filled", ""))
    picture.table("memory", 440, 318, "memory, at an hpa", ("", "", "", ""))
    picture.arrow("M156 348 C190 348 200 328 238 328")
    picture.arrow("M336 328 L438 328")
    picture.box("cpu", 690, 150, 190, 150, "Processor")
    picture.text(700, 194, "walks the shadow tables;", "small")
    picture.text(700, 212, "what it finds there costs", "small")
    picture.text(700, 230, "no more than natively", "small")
    picture.text(700, 262, "finds nothing, or too few", "small hot")
    picture.text(700, 280, "rights: VM exit", "small hot")
    picture.arrow("M785 300 C785 410 700 415 584 400")
    picture.text(694, 420, "walk", "small")
    picture.arrow("M690 272 C650 272 640 345 584 345", "exit")
    picture.text(596, 372, "exit: fill", "small hot")
    picture.arrow("M288 260 L288 164", "exit")
    picture.text(298, 220, "fill: read the guest's entry,", "small hot")
    picture.text(298, 238, "write-protect new tables", "small hot")
    picture.arrow("M785 150 C785 90 700 80 584 100")
    picture.text(640, 78, "store to a guest table", "small")
    picture.arrow("M540 190 L540 258", "exit")
    picture.text(550, 220, "exit: emulate it,", "small hot")
    picture.text(550, 238, "drop its shadow", "small hot")
    return picture.svg()


if __name__ == "__main__":
    (Path(__file__).parent / "images" / "concepts.svg").write_text(draw(), "utf-8")
