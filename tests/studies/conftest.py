"""What the tests of studies share."""

import pytest
import studies


@pytest.fixture(scope="session")
def study():
    """A study of the whole bundled recording; whoever changes it copies it first."""
    return studies.study()
