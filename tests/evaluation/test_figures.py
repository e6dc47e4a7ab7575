"""Perplexity, KL divergence and agreement on logits small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.encoding import IGNORED
from pipeline.evaluation.figures import Totals, add


def logits(*rows: list[float]) -> torch.Tensor:
    """Log-probabilities [1, T, 2] from the probabilities of token 0 and 1."""
    return torch.tensor([rows]).log()


def test_perplexity_is_the_exponential_of_the_mean_negative_log_likelihood():
    totals = Totals()
    add(totals, logits([0.5, 0.5], [0.25, 0.75], [0.9, 0.1]), torch.tensor([[0, 1, 0]]), None)
    assert totals.tokens == 2
    assert totals.perplexity == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.25)) / 2))


def test_the_divergence_is_from_the_reference_to_the_model():
    totals = Totals()
    reference, model = logits([0.5, 0.5], [0.5, 0.5]), logits([0.25, 0.75], [0.5, 0.5])
    add(totals, model, torch.tensor([[0, 0]]), reference)
    assert totals.divergence == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))


def test_a_model_beside_itself_diverges_by_nothing_and_agrees_always():
    totals = Totals()
    same = torch.randn(2, 7, 11)
    add(totals, same, torch.randint(0, 11, (2, 7)), same)
    assert totals.divergence == pytest.approx(0, abs=1e-6)
    assert totals.agreeing == totals.tokens == 12


def test_masked_positions_count_for_nothing():
    totals = Totals()
    labels = torch.tensor([[0, IGNORED, 1, IGNORED]])
    add(totals, logits([0.5, 0.5], [0.1, 0.9], [0.5, 0.5], [0.5, 0.5]), labels, None)
    assert totals.tokens == 1
    assert totals.perplexity == pytest.approx(1 / 0.9)


def test_batches_add_up_to_the_whole():
    scores, labels = torch.randn(4, 9, 5), torch.randint(0, 5, (4, 9))
    whole, parts = Totals(), Totals()
    add(whole, scores, labels, None)
    for i in range(4):
        add(parts, scores[i : i + 1], labels[i : i + 1], None)
    assert parts.perplexity == pytest.approx(whole.perplexity)


def test_a_hopeless_model_has_infinite_perplexity():
    assert Totals(tokens=1, negative_log_likelihood=1e9).perplexity == math.inf
