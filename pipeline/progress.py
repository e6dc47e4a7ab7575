"""What the engine says while it works: events, and the sinks that show them. The engine itself never prints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """`done` of `total` units of a stage's work are behind it."""

    stage: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure that the stage measured, such as a loss at a step."""

    stage: str
    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A sentence for whoever watches."""

    stage: str
    text: str


Event = Step | Metric | Message
Sink = Callable[[Event], None]

_sinks: ContextVar[tuple[Sink, ...]] = ContextVar("sinks", default=())


@contextlib.contextmanager
def shown_by(sink: Sink) -> Iterator[None]:
    """Send every event of the enclosed block to `sink` too."""
    token = _sinks.set((*_sinks.get(), sink))
    try:
        yield
    finally:
        _sinks.reset(token)


def emit(event: Event) -> None:
    """Hand an event, made here or received from a child process, to every sink."""
    for sink in _sinks.get():
        sink(event)


def step(stage: str, *, done: int, total: int, unit: str) -> None:
    """Say that `done` of `total` units are behind the stage."""
    emit(Step(stage=stage, done=done, total=total, unit=unit))


def metric(stage: str, name: str, value: float) -> None:
    """Say a figure that the stage measured."""
    emit(Metric(stage=stage, name=name, value=value))


def message(stage: str, text: str) -> None:
    """Say a sentence."""
    emit(Message(stage=stage, text=text))
