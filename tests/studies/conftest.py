"""What the tests of studies share."""

import pytest
import studies


@pytest.fixture(scope="session")
def study():
    """A study of the whole recording linux-fork; whoever changes it copies it first."""
    return studies.study()


@pytest.fixture(scope="session")
def small():
    """A study of the first records, for what does not depend on their number."""
    return studies.study(20_000, windows=10)
