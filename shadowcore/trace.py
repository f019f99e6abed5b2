"""Replays: a recorded guest run again on a virtual machine of some design, and what that costs.

The public name of `shadowcore.recording.replay`.
"""

from .recording.replay import (
    ACCESS,
    BUNDLED,
    INVLPG,
    LOAD_CR,
    LOAD_CR3,
    SNAPSHOT,
    STORE,
    TABLE,
    TABLE_END,
    USER,
    WRITE,
    Phase,
    Recording,
    RecordingFile,
    ReplayResult,
    load,
    machine,
    open_recording,
    replay,
)

__all__ = [
    "ACCESS",
    "BUNDLED",
    "INVLPG",
    "LOAD_CR",
    "LOAD_CR3",
    "SNAPSHOT",
    "STORE",
    "TABLE",
    "TABLE_END",
    "USER",
    "WRITE",
    "Phase",
    "Recording",
    "RecordingFile",
    "ReplayResult",
    "load",
    "machine",
    "open_recording",
    "replay",
]
