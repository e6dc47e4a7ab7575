"""A gate holds figures against bounds, and lets nothing through that is not a number."""

from __future__ import annotations

import math

import pytest

from pipeline.errors import StoreCorrupt
from pipeline.gates import Scores, judge, judge_all, read_report, write_report
from pipeline.sections import Bounds, Gates


def scores(variant: str = "nf4", *, perplexity: float = 10.2, kl: float = 0.02, top1: float = 0.9) -> Scores:
    return Scores(
        variant=variant, reference="dense", tokens=100, perplexity=perplexity, reference_perplexity=10.0,
        kl_divergence=kl, top1_agreement=top1,
    )  # fmt: skip


def test_a_model_within_its_bounds_passes():
    bounds = Bounds(perplexity_increase=0.03, kl_divergence=0.05, top1_agreement=0.8)
    assert judge(scores(), bounds).passed


@pytest.mark.parametrize(
    ("bounds", "figure"),
    [
        (Bounds(perplexity_increase=0.01), "perplexity_increase 0.02, bound at most 0.01"),
        (Bounds(kl_divergence=0.01), "kl_divergence 0.02, bound at most 0.01"),
        (Bounds(top1_agreement=0.95), "top1_agreement 0.9, bound at least 0.95"),
    ],
)
def test_a_miss_says_which_figure_missed_which_bound(bounds: Bounds, figure: str):
    assert judge(scores(), bounds).misses == (figure,)


@pytest.mark.parametrize("perplexity", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_misses_without_any_bound(perplexity: float):
    assert not judge(scores(perplexity=perplexity), Bounds()).passed


def test_a_bound_on_a_figure_nobody_measured_is_missed():
    alone = Scores(variant="dense", reference=None, tokens=1, perplexity=3.0)
    assert "was not measured" in judge(alone, Bounds(kl_divergence=1.0)).misses[0]


def test_a_tuned_model_that_misses_its_bounds_takes_its_variants_with_it():
    gates = Gates(perplexity_increase=0.5, tuned=Bounds(perplexity_increase=-0.1))
    verdicts = judge_all({"dense": scores("dense"), "tuned": scores("tuned"), "nf4": scores("nf4")}, gates)
    assert verdicts["dense"].passed
    assert not verdicts["tuned"].passed
    assert verdicts["nf4"].misses[0].startswith("tuned: perplexity_increase 0.02, bound at most -0.1")


def test_a_report_is_read_as_it_was_written(tmp_path):
    write_report(tmp_path, [scores("dense"), scores("nf4")])
    assert read_report(tmp_path) == {"dense": scores("dense"), "nf4": scores("nf4")}


def test_a_damaged_report_is_one_sentence(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(StoreCorrupt):
        read_report(tmp_path)
