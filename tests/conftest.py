"""What every test runs under: no telemetry, no hub, and torch's threads asleep while they wait."""

import os

from pipeline.child import WAITING

# Before torch is imported: OpenMP reads it once.
os.environ.update({**WAITING, "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "HF_HUB_OFFLINE": "1"})
