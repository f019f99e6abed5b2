"""The archive that a recording is written into: it can be made what it was, and what it uses of zipfile is there."""

import errno
import re
import zipfile

import pytest
from places import ROOT

from shadowcore.files import Replacement
from shadowcore.recording.archive import Archive

PRIVATE = ("start_dir", "filelist", "NameToInfo", "fp")
"""What Archive uses of zipfile.ZipFile, and Python does not document."""
MEMBERS = {"a.json": b"{}", "b/c.npy": bytes(range(256)) * 40, "b/d.npy": b"\0" * 5000, "e": b""}


def written(path, before, forgotten, after):
    """An archive of some members, when others between the two parts have been forgotten."""
    with Replacement(path) as file:
        archive = Archive(file)
        for name in before:
            archive.add(name, MEMBERS[name])
        mark = archive.mark()
        for name in forgotten:
            archive.add(name, MEMBERS[name] * 2)
        archive.forget(mark)
        for name in after:
            archive.add(name, MEMBERS[name])
        assert list(archive.checksums) == [*before, *after]
        archive.check_room()
        assert not archive.closed
        archive.close()
        assert archive.closed
    return path.read_bytes()


@pytest.mark.parametrize("kept", range(len(MEMBERS) + 1))
def test_what_is_forgotten_leaves_no_trace(tmp_path, kept):
    """Its names can be used again, in any number, and the bytes are those of an archive that never had it."""
    names = list(MEMBERS)
    expected = written(tmp_path / "never", names, [], [])
    for forgotten in (names[kept:], names[kept:][:1], ["e"] * ("e" not in names[:kept])):
        assert written(tmp_path / "forgotten", names[:kept], forgotten, names[kept:]) == expected
    with zipfile.ZipFile(tmp_path / "forgotten") as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == MEMBERS


def test_checksums_are_those_of_the_archive(tmp_path):
    with Replacement(tmp_path / "a") as file:
        archive = Archive(file)
        for name, data in MEMBERS.items():
            archive.add(name, data)
        found = archive.checksums
        archive.close()
    with zipfile.ZipFile(tmp_path / "a") as again:
        assert found == {info.filename: info.CRC for info in again.infolist()}


def test_what_is_dropped_writes_nothing_more(tmp_path):
    """Neither at once nor when the object goes, which is when zipfile would end the archive."""
    with Replacement(tmp_path / "a") as file:
        archive = Archive(file)
        archive.add("a.json", MEMBERS["a.json"])
        size = file.seek(0, 2)
        archive.drop()
        assert archive.closed
        del archive
        assert file.seek(0, 2) == size
    assert not zipfile.is_zipfile(tmp_path / "a")


def test_after_a_full_disk_the_archive_ends_with_what_it_had(tmp_path, monkeypatch):
    """At each byte of a member's data, header or descriptor that may be the first without room."""
    expected = written(tmp_path / "never", ["a.json"], [], ["e"])
    write = Replacement.write
    for room in (0, 10, 40, 100, 300):
        with Replacement(tmp_path / "full") as file:
            archive = Archive(file)
            archive.add("a.json", MEMBERS["a.json"])
            mark = archive.mark()

            def full(self, data, limit=mark[0] + room):
                if self.tell() + len(memoryview(data)) > limit:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(self, data)

            monkeypatch.setattr(Replacement, "write", full)
            with pytest.raises(OSError, match="No space left"):
                archive.add("b/c.npy", MEMBERS["b/c.npy"])
            if room < 100:
                with pytest.raises(OSError, match="No space left"):
                    archive.check_room()
            monkeypatch.undo()
            archive.forget(mark)
            archive.add("e", MEMBERS["e"])
            archive.close()
        assert (tmp_path / "full").read_bytes() == expected


def test_zipfile_has_what_is_used_of_it(tmp_path):
    """If a version of Python renames one of these, this says which, before a disk is full."""
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        assert {name for name in PRIVATE if not hasattr(archive, name)} == set()
        archive.writestr("x", b"data")
        assert archive.start_dir == archive.fp.tell()
        assert archive.filelist == archive.infolist()
        assert archive.NameToInfo == {"x": archive.getinfo("x")}
    assert archive.fp is None


def test_one_class_uses_it():
    used = re.compile(rf"\.({'|'.join(PRIVATE)})\b")
    files = [*(ROOT / "shadowcore").rglob("*.py"), *(ROOT / "pyx").rglob("*.pyx")]
    assert [path.name for path in files if used.search(path.read_text("utf-8"))] == ["archive.py"]
