"""Renders the pictures of the documentation from what the commands print: python docs/make_images.py"""

import re
from pathlib import Path

import shadowcore as sc
from shadowcore.report import terminal as report
from shadowcore.report.fit import Fitting


def main() -> None:
    console = Fitting(record=True, width=96, highlight=False, force_terminal=True)
    study = sc.study(windows=0)
    console.print(report.comparison(study, seconds=False))
    console.print()
    console.print(study.verdict, style="bold")
    target = Path(__file__).parent / "images" / "compare.svg"
    target.parent.mkdir(exist_ok=True)
    svg = console.export_svg(title="shadowcore compare")
    # Without its web fonts the picture shows in any monospaced font and fetches nothing.
    target.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S), "utf-8")


if __name__ == "__main__":
    main()
