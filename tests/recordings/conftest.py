"""What the tests of recordings share."""

import pytest
from program_recordings import LACKEY

import shadowcore as sc


@pytest.fixture(scope="session")
def lackey(tmp_path_factory):
    out = tmp_path_factory.mktemp("programs") / "program.screc"
    sc.importers.convert(LACKEY, out)
    return out
