"""Policies of replacement against another simulator's: `python -m bench.policies`, in the root of the repository.

The same strings of references go through `references.misses` and through libCacheSim (`pip install libcachesim`), which
shares nothing with this engine but the papers. Misses have to be equal. What is not compared, and why, is printed.
"""

import tempfile
from pathlib import Path

import click
import numpy as np

from shadowcore.engine.policies.references import misses

THEIRS = {
    "fifo": "FIFO",
    "lru": "LRU",
    "clock": "Clock",
    "arc": "ARC",
    "lirs": "LIRS",
    "sieve": "Sieve",
    "s3-fifo": "S3FIFO",
    "optimal": "Belady",
}
ORACLE = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
"""A record of their format oracleGeneral."""


def strings(length, seed=0):
    """Strings of references: by popularity, loops of several lengths, a scan now and then, at random."""
    rng = np.random.default_rng(seed)
    zipf = np.minimum(rng.zipf(1.1, length), length // 4)
    loops = np.concatenate([np.tile(np.arange(n), length // 4 // n + 1)[: length // 4] for n in (50, 150, 600, 2000)])
    scans = zipf.copy()
    for at in range(0, length - 2000, length // 8):
        scans[at : at + 1000] = length + at + np.arange(1000)
    return {"popular": zipf, "loops": loops, "scans": scans, "any": rng.integers(0, 1500, length)}


def written(string, file):
    """The string as a trace of theirs."""
    rows = np.zeros(len(string), ORACLE)
    rows["time"], rows["id"], rows["size"] = np.arange(len(string)), string + 1, 1
    following = {}
    for i in range(len(string) - 1, -1, -1):
        rows["next"][i] = following.get(int(string[i]), -1)
        following[int(string[i])] = i
    rows.tofile(file)


def theirs(name, size, file, length):
    import libcachesim

    reader = libcachesim.TraceReader(trace=str(file), trace_type=libcachesim.TraceType.ORACLE_GENERAL_TRACE)
    cache = getattr(libcachesim, name)(cache_size=size)
    ratio, _ = cache.process_trace(reader)
    return round(ratio * length)


@click.command()
@click.option("--length", default=100_000, help="References in a string.  [default: 100000]")
@click.option("--sizes", default="40,100,250,1000", help="Pages in the pool.  [default: 40,100,250,1000]")
def main(length: int, sizes: str) -> None:
    """Misses of our policies and of libCacheSim's, on the same strings."""
    try:
        import libcachesim  # noqa: F401
    except ImportError:
        raise click.ClickException("it needs the package 'libcachesim': pip install libcachesim") from None
    different = 0
    click.echo(f"{'string':<10}{'pool':>6}  {'policy':<9}{'ours':>9}{'theirs':>9}")
    for kind, string in strings(length).items():
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "trace"
            written(string, file)
            for size in map(int, sizes.split(",")):
                for policy, name in THEIRS.items():
                    ours, other = misses(policy, size, string), theirs(name, size, file, length)
                    different += ours != other
                    mark = "" if ours == other else "   DIFFERENT"
                    click.echo(f"{kind:<10}{size:>6}  {policy:<9}{ours:>9}{other:>9}{mark}")
    if different:
        raise click.ClickException(f"{different} are different")


if __name__ == "__main__":
    main()
