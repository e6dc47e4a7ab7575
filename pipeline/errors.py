"""Every error a user can meet, as one tree.

RequantError
├── InputError            exit 2: what the user gave is wrong; nothing was written
│   ├── RecipeError           a key, a value or a combination in the recipe
│   ├── CheckpointError       a model folder
│   │   ├── CorruptShard          a safetensors file that is cut short or does not say what it holds
│   │   ├── MissingTensor         a tensor that the model needs is in no shard
│   │   ├── UnexpectedTensor      a tensor that the model has no place for
│   │   └── UnsafePath            a name in a checkpoint that leaves its folder
│   ├── UnsupportedFormat     a format, or an option of it, that cannot be read or written
│   ├── DataError             a data file, or a row of it
│   ├── NotInStore            a name, variant, version or alias that the store does not hold
│   ├── NoSpace               the disk cannot hold what the next stage writes
│   └── MissingLibrary        an optional library that the recipe needs is not installed
├── WorkError             exit 1: the work failed
│   ├── OutOfMemory           the system killed the stage for memory
│   ├── StageDied             the stage's process ended without an answer
│   ├── StageFailed           the stage met an error that nobody foresaw
│   ├── NonFinite             a weight, a loss or a figure is NaN or infinite
│   ├── NotPositiveDefinite   what a layer was calibrated on leaves its Gram matrix singular
│   ├── CheckFailed           a training run that did not do what its method says
│   ├── ReloadMismatch        a written model does not reload as it was meant
│   └── StoreCorrupt          a stored file is not what its manifest says
└── GateRefused           exit 3: a variant missed a bound; its alias stays where it was

Each message is one sentence that names the thing, what was found, and the remedy. It may quote a checkpoint, which can
say anything: what a terminal would act on is shown by its escape, and what is long is cut in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MOST_CHARACTERS = 1500


class RequantError(Exception):
    """The root of the tree."""

    exit_code = 1

    def __init__(self, message: str, *rest: object) -> None:
        super().__init__(one_line(message), *rest)


@contextmanager
def about(name: str) -> Iterator[None]:
    """Put before what is raised inside the name of what it is about."""
    try:
        yield
    except RequantError as error:
        raise type(error)(f"{name}: {error}") from error


class InputError(RequantError):
    """What the user gave is wrong; nothing was written."""

    exit_code = 2


class RecipeError(InputError):
    """A key, a value or a combination in the recipe."""


class CheckpointError(InputError):
    """A model folder."""


class CorruptShard(CheckpointError):
    """A safetensors file that is cut short or does not say what it holds."""


class MissingTensor(CheckpointError):
    """A tensor that the model needs is in no shard."""


class UnexpectedTensor(CheckpointError):
    """A tensor that the model has no place for."""


class UnsafePath(CheckpointError):
    """A name in a checkpoint that leaves its folder."""


class UnsupportedFormat(InputError):
    """A format, or an option of it, that cannot be read or written."""


class DataError(InputError):
    """A data file, or a row of it."""


class NotInStore(InputError):
    """A name, variant, version or alias that the store does not hold."""


class NoSpace(InputError):
    """The disk cannot hold what the next stage writes."""


class MissingLibrary(InputError):
    """An optional library that the recipe needs is not installed."""


class WorkError(RequantError):
    """The work failed."""


class OutOfMemory(WorkError):
    """The system killed the stage for memory."""


class StageDied(WorkError):
    """The stage's process ended without an answer."""


class StageFailed(WorkError):
    """The stage met an error that nobody foresaw; `trace` is its traceback."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message, trace)
        self.trace = trace

    def __str__(self) -> str:
        return str(self.args[0])


class NonFinite(WorkError):
    """A weight, a loss or a figure is NaN or infinite."""


class NotPositiveDefinite(WorkError):
    """What a layer was calibrated on leaves its Gram matrix singular, however much it is damped."""


class CheckFailed(WorkError):
    """A training run that did not do what its method says."""


class ReloadMismatch(WorkError):
    """A written model does not reload as it was meant."""


class StoreCorrupt(WorkError):
    """A stored file is not what its manifest says."""


class GateRefused(RequantError):
    """A variant missed a bound; its alias stays where it was."""

    exit_code = 3


def one_line(text: str) -> str:
    """`text` on one line of printable characters, at most MOST_CHARACTERS of them: its beginning and its end."""
    line = " ".join(text.split())
    if len(line) > MOST_CHARACTERS:
        line = f"{line[: MOST_CHARACTERS // 2]} … {line[3 - MOST_CHARACTERS // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
