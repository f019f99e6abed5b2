"""Every block of code in docs/recordings.md and docs/studies.md runs as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import shadowcore

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs" / name for name in ("recordings.md", "studies.md")]
TEXT = "".join(page.read_text("utf-8") for page in PAGES if page.exists())
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(tmp_path, number):
    language, code = BLOCKS[number]
    if "shadowcore record " in code and shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "shadowcore").symlink_to(Path(shadowcore.__file__).parent)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "shadowcore"
    command.write_text(f"#!{sys.executable}\nfrom shadowcore.cli import main\nmain()\n")
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    program = [sys.executable, "-c", code] if language == "python" else ["/bin/sh", "-ec", code]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout


def test_there_are_blocks_of_both_languages():
    assert {language for language, _ in BLOCKS} == {"sh", "python"}
    assert len(BLOCKS) >= 3
