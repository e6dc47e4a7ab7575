"""What every test runs under: no telemetry, no hub, torch's threads asleep while they wait, Ctrl-C as it should be."""

import os
import signal
import sys

import pytest

from pipeline import child
from pipeline.child import WAITING
from pipeline.preloading import preload

# Before torch is imported: OpenMP reads it once.
os.environ.update({**WAITING, "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "HF_HUB_OFFLINE": "1"})

# A test's first child imports for all that follow it what each would import for itself, which takes 3 to 6 seconds.
child.PRELOAD = preload("llama")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a worker of pytest-xdist leaves it, to whatever it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Each test begins with gradients on, whatever one before it in this process switched off and left so."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)
