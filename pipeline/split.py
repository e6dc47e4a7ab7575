"""Which part of the data a row belongs to: training, validation or held out, by the hash of what it says.

The unit interval is cut at the shares; a row's place in it is the hash of its content. So a row stays where it is when
others are added, removed or reordered, and equal rows are together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Literal

from pipeline.sections import Data

Part = Literal["train", "validation", "held_out"]


def point(content: Mapping[str, Any]) -> float:
    """Where a row lies in [0, 1): the first 53 bits of the SHA-256 of its content's canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return (int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def part_of(content: Mapping[str, Any], data: Data) -> Part:
    """The part that a row of this content belongs to."""
    if not (data.held_out or data.validation):
        return "train"
    at = point(content)
    if at < data.held_out:
        return "held_out"
    return "validation" if at < data.held_out + data.validation else "train"


def share_of(data: Data) -> float:
    """The share of the rows that the part which is read should have."""
    shares = {"held_out": data.held_out, "validation": data.validation}
    return shares.get(data.part, 1.0 - data.held_out - data.validation)
