"""Guests to be recorded under an emulator: which emulators are here, a guest of the recorder's own, and Linux."""

import os
import shutil
import subprocess
import sys

import pytest
from places import ROOT

from shadowcore.errors import ConfigError
from shadowcore.recording import plugin

RECORDER = ROOT / "recorder"
GUESTS = ROOT / "build" / "guests"

EMULATORS = os.environ.get("SHADOWCORE_QEMU", "qemu-system-x86_64").split(os.pathsep)
"""Programs to record under; several are separated as in PATH."""

LINUX = {
    "unpacked": ("vmlinux-amd64", "amd64", "max,la57=off", ""),
    "4-level": ("vmlinuz-amd64", "amd64", "max,la57=off", ""),
    "isolation": ("vmlinuz-amd64", "amd64", "max,la57=off", "pti=on"),
    "5-level": ("vmlinuz-amd64", "amd64", "max,la57=on", ""),
    "no-kaslr": ("vmlinuz-amd64", "amd64", "max,la57=off", "nokaslr"),
    "PAE": ("vmlinuz-686-pae", "i386", "max", ""),
    "32-bit": ("vmlinuz-686", "i386", "max", ""),
    "two-processors": ("vmlinuz-amd64", "amd64", "max,la57=off", "", "-smp", "2"),
    "two-PAE": ("vmlinuz-686-pae", "i386", "max", "", "-smp", "2"),
    "two-5-level-isolation": ("vmlinuz-amd64", "amd64", "max,la57=on", "pti=on", "-smp", "2"),
}
"""Guests that boot Linux, by name: what linux_command takes of each."""


def needs(emulator):
    """Skip where a recording cannot be made, with the reason."""
    try:
        plugin.back_end(plugin.emulator(emulator).version)
    except ConfigError as why:
        pytest.skip(str(why))
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("a C compiler is not installed here (gcc)")
    if not RECORDER.is_dir():
        pytest.skip("the source of the recorder's plug-in is not here")


def modes(folder, name="modes"):
    """A guest of recorder/guests that is no operating system, as a file for -kernel."""
    out = folder / name
    options = ["-m32", "-nostdlib", "-static", "-Wl,-Ttext=0x100000,--build-id=none"]
    command = [os.environ.get("CC", "cc"), *options, "-o", str(out), str(RECORDER / "guests" / f"{name}.S")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the C compiler makes no 32-bit program: {done.stderr.splitlines()[-1]}")
    return out


def modes_command(emulator, kernel, ends=True):
    """QEMU's command line for it. ends: it ends by itself, otherwise it goes on for ever."""
    port = ["-device", "isa-debug-exit,iobase=0xf4"] if ends else []
    return [
        emulator,
        "-cpu",
        "max",
        "-m",
        "16",
        "-nodefaults",
        "-no-reboot",
        "-display",
        "none",
        *port,
        "-kernel",
        kernel,
    ]


def linux_command(emulator, folder, kernel, busybox, cpu="max", append="", *more):
    """QEMU's command line for a Linux of GUESTS that boots, runs a few pipelines, and ends."""
    for name in (kernel, f"busybox-{busybox}"):
        if not (GUESTS / name).is_file():
            pytest.skip(f"{GUESTS / name} is not there: recorder/fetch.sh fetches it")
    sys.path.insert(0, str(RECORDER))
    try:
        from initramfs import initramfs
    finally:
        sys.path.remove(str(RECORDER))
    disk = folder / f"{kernel}.gz"
    init = (RECORDER / "guests" / "init.sh").read_text("utf-8")
    disk.write_bytes(initramfs((GUESTS / f"busybox-{busybox}").read_bytes(), init))
    quiet = ["-nodefaults", "-no-reboot", "-display", "none", "-m", "128"]
    image = ["-kernel", str(GUESTS / kernel), "-initrd", str(disk)]
    return [emulator, *quiet, "-cpu", cpu, *image, "-append", f"quiet panic=-1 {append}", *more]
