"""Instructions that fixed runs take, by callgrind: `python -m bench.instructions`, in the root of the repository.

The counts of microruns.py are compared with those in instructions.json; a run that takes over 3 % more fails, by its
name. Counts do not depend on the machine or its load, but on the compiler: they are kept by toolchain, and with one
that has none nothing is compared. --update keeps what is counted now.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))

from yardsticks import NoCompiler, compiler

BENCH = Path(__file__).parent
KEPT = BENCH / "instructions.json"
TOLERANCE = 0.03
LOOKED = ", tables looked at"
"""Behind the name of a run: it may take 5 % more than the run without, whatever is kept."""
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # The C library picks its copying loops by processor: all pick the same.
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-AVX2_Usable,-AVX512F,-AVX512VL,-ERMS,-FSRM,-EVEX",
}


class Unavailable(Exception):
    """Nothing can be counted here, and why."""


def toolchain() -> str:
    """What the engine's modules were compiled with: that, and nothing of the machine, decides how they count."""
    import shadowcore.engine.vcpu

    code = Path(shadowcore.engine.vcpu.__file__).read_bytes()
    built = re.findall(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", code)
    translated = re.search(rb"_cython_(\d+_\d+_\w+?)\0", code)
    if not built or translated is None:
        raise Unavailable("the modules do not say what compiled them")
    flags = " ".join(sysconfig.get_config_vars("CFLAGS")[0:1] or "") + " " + os.environ.get("CFLAGS", "")
    telling = sorted({flag for flag in flags.split() if re.match(r"-f|-m|-O|-D_FORTIFY|-Wp,-D_FORT", flag)})
    python = f"Python {platform.python_version_tuple()[0]}.{platform.python_version_tuple()[1]}"
    parts = [platform.machine(), sorted(set(built))[0].decode(), f"Cython {translated[1].decode().replace('_', '.')}"]
    return ", ".join([*parts, python, *telling])


def build_marker(directory: str) -> Path:
    """measured.c as a library."""
    library = Path(directory) / "measured.so"
    command = [*compiler(), "-O1", "-fPIC", "-shared", "-o", str(library), str(BENCH / "measured.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"measured.c does not compile: {done.stderr.strip()[-300:]}")
    return library


def costs(profile: Path) -> tuple[int, int]:
    """Instructions in a profile of callgrind: all, and those within the engine's own modules."""
    total = engine = 0
    names: dict[str, str] = {}
    inside = called = False
    for line in profile.read_text("utf-8").splitlines():
        if line.startswith(("ob=", "cob=")):  # "(number) name" where it is first met, then "(number)"
            number, _, name = line.partition("=")[2].partition(" ")
            names.setdefault(number, name)
            if line.startswith("ob="):
                inside = "/shadowcore/" in names[number]
        elif line.startswith("calls="):
            called = True  # the next line has what the callee took, which is counted there
        elif line[:1].isdigit() or line.startswith(("+", "-", "*")):
            if not called:
                cost = int(line.split()[1])
                total += cost
                engine += cost * inside
            called = False
    return total, engine


def profiles(module: str) -> Iterator[tuple[str, int, list[tuple[int, int]]]]:
    """Run `python -m bench.MODULE LIBRARY` under callgrind. It prints lines of a name, operations, and how many calls
    of the library's function it made for them: name, operations, and the costs of those calls."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise Unavailable("valgrind is not installed")
    with tempfile.TemporaryDirectory(prefix="shadowcore-bench-") as directory:
        library = build_marker(directory)
        output = Path(directory) / "profile"
        command = [valgrind, "-q", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no", "--dump-line=no"]
        command += [f"--callgrind-out-file={output}", sys.executable, "-m", f"bench.{module}"]
        done = subprocess.run(
            [*command, str(library)],
            cwd=BENCH.parent,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(BENCH.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise click.ClickException(f"the runs failed under valgrind:\n{done.stderr[-2000:]}")
        number = 0
        for line in done.stdout.splitlines():
            name, operations, calls = line.split("\t")
            found = [costs(output.with_suffix(f".{number + i}")) for i in range(1, int(calls) + 1)]
            number += int(calls)
            yield name, int(operations), found


def count() -> dict[str, dict[str, float]]:
    """Instructions an operation, by name of the run: all, and those of the engine."""
    counted = {}
    for name, n, (once, twice) in profiles("microruns"):
        all_, engine = ((b - a) / n for a, b in zip(once, twice, strict=True))
        counted[name] = {"instructions": round(all_, 2), "engine": round(engine, 2)}
    return counted


def kept() -> dict[str, dict[str, dict[str, float]]]:
    """The counts in the file, by toolchain."""
    return json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}


def grown(found: dict[str, dict[str, float]], known: dict[str, dict[str, float]]) -> list[str]:
    """What is wrong with what was found, in words: runs that take more, and runs that are not the same."""
    wrong = [f"{name}: it is not in {KEPT.name}" for name in found if name not in known]
    wrong += [f"{name}: it was not run" for name in known if name not in found]
    for name in found.keys() & known.keys():
        for what in ("instructions", "engine"):
            now, before = found[name][what], known[name][what]
            if now > before * (1 + TOLERANCE):
                of = " in the engine" if what == "engine" else ""
                wrong.append(f"{name}: {now:.1f} instructions{of}, {now / before - 1:+.1%} of {before:.1f}")
    for name in found:
        base = name.removesuffix(LOOKED)
        if base != name and base in found:
            now, before = found[name]["engine"], found[base]["engine"]
            if now > 1.05 * before:
                wrong.append(f"{name}: {now:.1f} instructions in the engine, {now / before - 1:+.1%} of {base}")
    return sorted(wrong)


@click.command()
@click.option("--update", is_flag=True, help="Keep what is counted.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def main(update: bool, as_json: bool) -> None:
    """Count instructions, and compare with what is kept. Exit status 1 where a run takes over 3 % more."""
    try:
        chain = toolchain()
        every = kept()
        if not update and chain not in every:
            raise Unavailable(
                f"nothing is kept for this toolchain ({chain}); kept: {'; '.join(every) or 'none'}. "
                "`python -m bench.instructions --update` keeps the counts of a build that is known to be good"
            )
        found = count()
    except (Unavailable, NoCompiler) as error:
        click.echo(f"instructions are not compared: {error}", err=True)
        sys.exit(1 if update else 0)
    known = every.get(chain, {})
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(f"{'instructions':>12} {'engine':>9} {'kept':>9}        run   ({chain})")
        for name, counts in found.items():
            before = known.get(name, {}).get("instructions")
            change = f"{before:9.1f} {counts['instructions'] / before - 1:+6.1%}" if before else " " * 16
            click.echo(f"{counts['instructions']:12.1f} {counts['engine']:9.1f} {change} {name}")
    if update:
        every[chain] = found
        KEPT.write_text(json.dumps(dict(sorted(every.items())), indent=1) + "\n", "utf-8")
        return
    wrong = grown(found, known)
    if wrong:
        raise click.ClickException("\n".join(["more instructions than kept:", *wrong]))


if __name__ == "__main__":
    main()
