"""Renders the pictures of the documentation from what the commands print: python docs/make_images.py"""

import re
from pathlib import Path

from rich.console import Console

import shadowcore as sc
from shadowcore.report import terminal as report


def main() -> None:
    console = Console(record=True, width=96, highlight=False)
    console.print(report.comparison(sc.study(windows=0)))
    target = Path(__file__).parent / "images" / "compare.svg"
    target.parent.mkdir(exist_ok=True)
    svg = console.export_svg(title="shadowcore compare")
    # Without its web fonts the picture shows in any monospaced font and fetches nothing.
    target.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S), "utf-8")


if __name__ == "__main__":
    main()
