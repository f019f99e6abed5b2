"""A page in a browser: what its scripts make of it."""

import shutil
import subprocess
from pathlib import Path

import pytest


def browser():
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"):
        if found := shutil.which(name):
            return found
    return None


def rendered(path, fragment=""):
    """The document after its scripts have run, as a browser writes it. fragment: of its address, with #."""
    found = browser()
    if found is None:
        pytest.skip("no Chromium or Chrome on PATH")
    profile = Path(path).parent / "profile"
    command = [found, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [
        f"--user-data-dir={profile}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        Path(path).as_uri() + fragment,
    ]
    try:
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{found} does not come to an end here")
    if done.returncode or b"<html" not in done.stdout:
        pytest.skip(f"{found} does not run here: exit status {done.returncode}")
    return done.stdout.decode("utf-8")
