"""Accuracy, F1, divergence, error and nearness on answers small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.evaluation import labels

# Rows 0 and 1 are said to be label 0, row 2 label 1, row 3 label 2; nobody is or is said to be label 3.
LOGITS = torch.tensor([[2.0, 0, 0, -9], [1.0, 0, 0, -9], [0, 3.0, 0, -9], [0, 0, 1.0, -9]])
TRUTH = torch.tensor([0, 1, 1, 2])


def test_accuracy_is_the_share_of_right_labels():
    assert labels.accuracy(LOGITS, TRUTH) == 3 / 4


def test_f1_is_the_mean_over_the_labels_that_occur():
    """Label 0: one right, one too many, 2/3; label 1: one right, one missed, 2/3; label 2: 1; label 3 is left out."""
    assert labels.macro_f1(LOGITS, TRUTH) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_a_label_that_is_only_predicted_counts_as_zero():
    """Row 1 is said to be 2, which no row is: 0 gets 2/3 (one missed), 2 gets 0."""
    assert labels.macro_f1(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]), torch.tensor([0, 0])) == pytest.approx(1 / 3)


def test_the_divergence_is_from_the_reference_to_the_model_and_a_mean_over_rows():
    reference = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    model = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    expected = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert labels.kl_divergence(model, reference) == pytest.approx(expected, abs=1e-7)
    assert labels.kl_divergence(model + 3, model) == pytest.approx(0, abs=1e-7)


def test_agreement_asks_nobody_for_the_truth():
    assert labels.agreement(LOGITS, LOGITS.flip(0)) == 0
    assert labels.agreement(LOGITS, 2 * LOGITS) == 1
    assert labels.agreement(LOGITS[:2], torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])) == 1 / 2


def test_the_error_is_the_root_of_the_mean_square():
    found = labels.root_mean_squared_error(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 4.0]))
    assert found == pytest.approx(math.sqrt(5 / 3))


def test_a_divergence_far_below_what_float32_resolves_is_measured():
    """Two even logits, one moved by d, diverge by d squared / 8; float32 would say something of the order of 1e-8."""
    found = labels.kl_divergence(torch.tensor([[2.0**-13, 0.0]]), torch.zeros(1, 2))
    assert found == pytest.approx(2.0**-26 / 8, rel=1e-4)


def test_an_anchor_is_right_where_its_own_positive_is_the_nearest_by_angle_not_by_length():
    anchors = torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.0]])
    positives = torch.tensor([[0.01, 0.0], [0.0, 100.0]])
    found, right = labels.nearest(anchors, positives, torch.tensor([0, 1, 1]))
    assert found.tolist() == [0, 1, 0]
    assert right.tolist() == [1, 1, 0]


def test_equally_near_positives_share_the_credit():
    """Else a projector that gives every text the same vector would be right about all of them."""
    same = torch.tensor([[0.3, 0.4, 0.5]]).repeat(1500, 1)
    _, right = labels.nearest(same, same, torch.arange(1500))
    assert right.mean().item() == pytest.approx(1 / 1500)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_one_answer_that_is_not_finite_leaves_no_figure(broken):
    logits = LOGITS.clone()
    logits[3, 0] = broken
    assert math.isnan(labels.accuracy(logits, TRUTH))
    assert math.isnan(labels.macro_f1(logits, TRUTH))
    assert math.isnan(labels.agreement(logits, LOGITS))
    assert math.isnan(labels.agreement(LOGITS, logits))
    assert math.isnan(labels.kl_divergence(logits, LOGITS))
    assert not math.isfinite(labels.root_mean_squared_error(logits[:, 0], TRUTH))
    _, right = labels.nearest(LOGITS, logits, TRUTH)
    assert right.isnan().all()
