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


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """A test that leaves gradients off in its process fails itself, and not those that follow it there."""
    yield
    if torch := sys.modules.get("torch"):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
