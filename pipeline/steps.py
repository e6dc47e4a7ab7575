"""A step of a plan: a stage, what goes in, what comes out and whether the store has it already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.manifest import Origin
from pipeline.sections import Data
from pipeline.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One output of a step: the artifact that has its fingerprint, or why there is none."""

    variant: str
    origin: Origin
    artifact: Artifact | None
    needed: bool
    reason: str

    @property
    def pending(self) -> bool:
        """Whether the step must run for it."""
        return self.needed and self.artifact is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a step will need: bytes of disk and of memory (activations aside), and the seconds it took last time."""

    disk: int
    memory: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A stage with its inputs. `inputs` maps a role to `source` or to a variant that an earlier step makes.

    `name` is the step's own: a stage may have two. `options` change the result and are part of the fingerprint.
    """

    name: str
    stage: str
    inputs: Mapping[str, str]
    outputs: tuple[Planned, ...]
    needs: Needs
    data: Mapping[str, Data] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()

    @property
    def pending(self) -> tuple[Planned, ...]:
        """The outputs that are still to be made."""
        return tuple(output for output in self.outputs if output.pending)
