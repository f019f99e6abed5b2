"""Instructions of an operation at a small and a large point of each curve: `python -m bench.growth`.

Where the counts are the same, what grows with the size is the time that the caches of the machine take, and nothing
else. Writes docs/performance/growth.json; --check writes nothing, and fails where a count grows by over 3 %.
"""

import gc
import json
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))

import curves
from instructions import TOLERANCE, Unavailable, profiles
from microruns import marker
from yardsticks import NoCompiler

OUTPUT = curves.OUTPUT / "growth.json"
POINTS = {
    "guest-size": (16, 4096),
    "address-spaces": (10, 100),
    "pool-size": (256, 16_384),
    "mappings": (16, 4096),
    "shared-tables": (16, 4096),
}
OPERATIONS = 4000
"""Of a batch, where it has a choice."""
HITS = ("hit, ",)
"""How these lines begin: accesses that find their translation in the memo of the vcpu, or walk. How many do depends on
the pages that they go to."""


def run() -> None:
    """Under callgrind: each line of each curve at its two points; a batch of no operations is counted before."""
    measured = marker()
    curves.FAULTS = OPERATIONS
    nothing = curves.accesses(curves.pages(0))
    for curve in curves.CURVES:
        for x in POINTS[curve.name]:
            cpu, works = curve.build(x, None)
            for work in works:
                for _ in range(2):  # whatever is done only once is done
                    if work.prepare is not None:
                        work.prepare()
                    result = work.call()
                cpu.run(nothing)
                measured(lambda cpu=cpu: cpu.run(nothing))
                if work.prepare is not None:
                    work.prepare()
                result = measured(work.call)
                if work.check is not None:
                    work.check(result)
                print(f"{curve.name}/{x}/{work.line}", work.operations, 2, sep="\t", flush=True)
            del cpu, works
            gc.collect()


@click.command()
@click.argument("library", required=False)
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 where a count grows.")
def main(library: str | None, check: bool) -> None:
    """Count, and write docs/performance/growth.json."""
    if library is not None:
        run()
        return
    found: dict[str, dict[str, list[float]]] = {}
    try:
        for name, n, (fixed, all_) in profiles("growth"):
            curve, _, line = name.split("/")
            found.setdefault(curve, {}).setdefault(line, []).append(round((all_[0] - fixed[0]) / n, 1))
    except (Unavailable, NoCompiler) as error:
        click.echo(f"nothing is counted: {error}", err=True)
        sys.exit(0 if check else 1)
    grown = []
    for curve, lines in found.items():
        for line, (small, large) in lines.items():
            click.echo(f"{small:10.1f} {large:10.1f} {large / small - 1:+7.1%}  {curve}: {line}")
            if large > small * (1 + TOLERANCE) and not line.startswith(HITS):
                grown.append(f"{curve}: {line}: {large / small - 1:+.1%} instructions")
    if not check:
        OUTPUT.write_text(json.dumps({"points": POINTS, "instructions": found}, indent=1) + "\n", "utf-8")
    if grown:
        raise click.ClickException("\n".join(["these grow:", *grown]))


if __name__ == "__main__":
    main()
