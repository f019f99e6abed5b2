r"""What recording costs: a Linux guest that boots and runs a few pipelines, under QEMU alone and under the recorder.

    recorder/fetch.sh
    python -m bench.recorded_guest [--rounds 6] [--guest 4-level] [--guest isolation] [EMULATOR]...

The two take turns. Prints the median over the rounds of each ratio to QEMU alone: processor time of the emulator, of
the emulator and the command that writes the file, and elapsed time, which counts on a machine that does nothing else.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "makers"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from emulated import LINUX, linux_command

from shadowcore.recording import emulated


def used(run):
    """Seconds of processor time in child processes and in this one, and elapsed, while `run` is called."""

    def now():
        return [sum(resource.getrusage(of)[:2]) for of in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)] + [
            time.perf_counter()
        ]

    before = now()
    run()
    return [after - start for start, after in zip(before, now(), strict=True)]


def measured(emulator, guest, rounds, folder):
    """For each round: (emulator's, emulator's and writer's, elapsed) as ratios, and seconds of QEMU alone."""
    command = linux_command(emulator, folder, *LINUX[guest])
    for _ in range(rounds):
        alone = used(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        recorded = used(lambda: emulated.record(command, folder / "guest.screc"))
        yield (
            recorded[0] / alone[0],
            (recorded[0] + recorded[1]) / alone[0],
            recorded[2] / alone[2],
            alone[0],
        )


def main():
    """Read the command line, measure, print a line for each guest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("emulators", metavar="EMULATOR", nargs="*", default=["qemu-system-x86_64"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--guest", dest="guests", action="append", choices=LINUX)
    options = parser.parse_args()
    print(f"{'guest':<12}{'emulator':>10}{'with writer':>13}{'elapsed':>9}{'alone, s':>10}  (least to most, emulator)")
    for emulator in options.emulators:
        for guest in options.guests or ("4-level", "isolation"):
            with tempfile.TemporaryDirectory() as folder:
                rounds = list(measured(emulator, guest, options.rounds, Path(folder)))
            middle = [statistics.median(column) for column in zip(*rounds, strict=True)]
            least, most = min(rounds)[0], max(rounds)[0]
            print(
                f"{guest:<12}{middle[0]:>10.2f}{middle[1]:>13.2f}{middle[2]:>9.2f}{middle[3]:>10.1f}"
                f"  {least:.2f} to {most:.2f}  {emulator}",
                flush=True,
            )


if __name__ == "__main__":
    main()
