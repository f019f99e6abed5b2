"""What the tests of embedding share."""

import pytest
from capi import API, Guest


@pytest.fixture
def guest():
    made = Guest()
    yield made
    API.vm_destroy(made.vm)
