"""The command line, called in this process or started as one of its own."""

import os
import sys
import time
from pathlib import Path

from click.testing import CliRunner

from shadowcore.cli import main

COMMAND = [sys.executable, "-c", "from shadowcore.cli import main; main()"]
# For a process that is started elsewhere: it finds what this one does.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run(*arguments, status=0):
    """What the command prints; it ends with that exit status."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


def refused(*arguments):
    """The same of a command that is refused: exit status 2, and one line that names the command."""
    output = run(*arguments, status=2)
    assert output.startswith("shadowcore: ")
    assert output.count("\n") == 1
    return output


def wait_for_work(process, seconds=1.5):
    """Until a process that was started has had so much time of the processor: it then is beyond its imports, however
    many others run. Where that cannot be seen, 2 s pass."""
    stat = Path(f"/proc/{process.pid}/stat")
    if not stat.exists():
        time.sleep(2)
        return
    ticks = os.sysconf("SC_CLK_TCK")
    while process.poll() is None and sum(map(int, stat.read_text().rsplit(")", 1)[1].split()[11:13])) < seconds * ticks:
        time.sleep(0.05)
