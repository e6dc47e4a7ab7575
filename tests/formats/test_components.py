"""What a checkpoint's config says is matched with a time limit."""

import re

import pytest

from pipeline.errors import CheckpointError
from pipeline.formats import components
from pipeline.formats.components import matches


def test_a_pattern_matches_from_the_start_of_a_name():
    assert matches(r"model\..*q_proj", "model.layers.0.q_proj", key="targets")
    assert not matches("q_proj", "model.layers.0.q_proj", key="targets")


def test_a_pattern_that_backtracks_forever_in_the_standard_library_ends():
    """`re` takes longer than the universe is old for this one."""
    assert not matches(r"(a+)+$", "a" * 80 + ".proj", key="targets")


def test_a_pattern_that_takes_too_long_is_an_error(monkeypatch):
    monkeypatch.setattr(components, "PATTERN_SECONDS", 0.1)
    with pytest.raises(CheckpointError, match=r"targets pattern .* takes too long to match xxx"):
        matches("(x{1,9999}){1,9999}" * 50, "x" * 100, key="targets")


def test_a_pattern_that_took_too_long_once_is_not_tried_on_the_next_name(monkeypatch):
    monkeypatch.setattr(components, "PATTERN_SECONDS", 0.1)
    pattern = "(y{1,9999}){1,9999}" * 50
    with pytest.raises(CheckpointError, match="takes too long to match yyy"):
        matches(pattern, "y" * 100, key="targets")
    with pytest.raises(CheckpointError, match="takes too long to match z"):
        matches(pattern, "z", key="targets")


@pytest.mark.parametrize("pattern", ["(", "[", "(" * 3000 + ")" * 3000, "*"])
def test_what_is_no_pattern_is_an_error(pattern):
    with pytest.raises(CheckpointError, match=re.escape("targets pattern") + ".* is no regular expression"):
        matches(pattern, "model", key="targets")
