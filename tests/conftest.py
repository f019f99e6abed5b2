"""How the tests are run: in parallel, and by which profile of HYPOTHESIS_PROFILE the random ones: `ci` repeats one
short run, `nightly` searches on."""

import gc
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

settings.register_profile(
    "ci", max_examples=300, derandomize=True, database=None, deadline=None, suppress_health_check=SLOW_IS_FINE
)
settings.register_profile("nightly", max_examples=20_000, deadline=None, suppress_health_check=SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# A shell starts what it runs in the background with Ctrl-C ignored, and so would be every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """The tests themselves, thousands of objects, stay: no collection of what a test leaves looks at them again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A folder of tests, or all of them, runs in a process a core, if pytest-xdist is there; -n says otherwise."""
    options = config.option
    if (
        config.pluginmanager.hasplugin("xdist")
        and not hasattr(config, "workerinput")
        and options.numprocesses is None
        and any(Path(argument).is_dir() for argument in config.args)
    ):
        options.numprocesses = "auto"
        options.benchmark_disable = True  # pytest-benchmark would do so too, with a warning
