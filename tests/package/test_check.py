"""shadowcore/engine/check.pxd: what does not fit does not compile."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import shadowcore

HEADER = Path(shadowcore.__file__).parent / "engine" / "check.pxd"
COMPILERS = {"c": ("cc", "gcc", "clang"), "c++": ("c++", "g++", "clang++")}
STANDARDS = [("c", "c99"), ("c", "c11"), ("c++", "c++17")]


@pytest.mark.parametrize(("language", "standard"), STANDARDS)
def test_a_false_condition_stops_the_compiler(language, standard, tmp_path):
    """As Cython writes it: enumerators and sizes, in a function."""
    compiler = next(filter(None, map(shutil.which, COMPILERS[language])), None)
    if compiler is None:
        pytest.skip("no compiler")
    macro = re.search(r'cdef extern from \*:\n    """\n(.*?)"""', HEADER.read_text("utf-8"), re.S)[1]
    source = tmp_path / "check.txt"
    said = {}
    for count in (8, 9):
        source.write_text(
            f"{macro}\nenum {{ CODES = {count} }};\n"
            "void f(void);\nvoid f(void) { int i = 0; (void)i; sc_check((CODES <= (8 * (sizeof(char))))); }\n"
        )
        command = [compiler, "-x", language, f"-std={standard}", "-Wall", "-Werror", "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        said[count] = done.returncode == 0, done.stderr
    assert said[8][0], said[8][1]
    assert not said[9][0]
    assert "CODES" in said[9][1]
