"""A gate holds figures against bounds, and lets nothing through that is not a number."""

from __future__ import annotations

import json
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


HEAD = Scores(
    variant="nf4", reference="tuned", rows=200, accuracy=0.85, reference_accuracy=0.9, f1=0.8, reference_f1=0.88,
    kl_divergence=0.02, top1_agreement=0.9,
)  # fmt: skip
REGRESSOR = Scores(variant="nf4", reference="tuned", rows=200, root_mean_squared_error=1.1, reference_error=1.0)


@pytest.mark.parametrize(
    ("scores", "kept", "missed", "said"),
    [
        (HEAD, Bounds(accuracy=0.85), Bounds(accuracy=0.86), "accuracy 0.85, bound at least 0.86"),
        (HEAD, Bounds(accuracy_drop=0.05), Bounds(accuracy_drop=0.04), "accuracy_drop 0.05, bound at most 0.04"),
        (HEAD, Bounds(f1=0.8), Bounds(f1=0.81), "f1 0.8, bound at least 0.81"),
        (HEAD, Bounds(kl_divergence=0.02), Bounds(kl_divergence=0.019), "kl_divergence 0.02, bound at most 0.019"),
        (HEAD, Bounds(top1_agreement=0.9), Bounds(top1_agreement=0.91), "top1_agreement 0.9, bound at least 0.91"),
        (REGRESSOR, Bounds(error_increase=0.1), Bounds(error_increase=0.09), "error_increase 0.1, bound at most 0.09"),
    ],
)
def test_each_bound_of_a_head_is_kept_up_to_itself_and_missed_beyond(scores, kept, missed, said):
    assert judge(scores, kept).passed
    assert judge(scores, kept).judged
    assert judge(scores, missed).misses == (said,)


def test_a_negative_bound_asks_for_a_gain():
    better = Scores(variant="tuned", reference="dense", rows=9, accuracy=0.9, reference_accuracy=0.7)
    assert judge(better, Bounds(accuracy_drop=-0.2)).passed
    assert not judge(better, Bounds(accuracy_drop=-0.21)).passed


@pytest.mark.parametrize(
    "figures",
    [
        {"accuracy": math.nan}, {"accuracy": 0.5, "reference_accuracy": math.nan}, {"f1": math.nan},
        {"root_mean_squared_error": math.inf}, {"kl_divergence": math.nan}, {"top1_agreement": math.nan},
    ],
)  # fmt: skip
def test_no_figure_of_a_head_that_is_not_finite_is_let_through(figures):
    assert not judge(Scores(variant="nf4", rows=9, **figures), Bounds()).passed


def test_a_bound_that_says_nothing_of_a_head_is_missed_with_the_figures_name():
    assert judge(HEAD, Bounds(perplexity_increase=0.1)).misses[0].startswith("perplexity_increase was not measured")
    assert judge(HEAD, Bounds(error_increase=0.1)).misses[0].startswith("error_increase was not measured")


def test_beside_a_reference_without_any_error_every_error_is_too_much():
    perfect = Scores(variant="nf4", rows=9, root_mean_squared_error=0.0, reference_error=0.0)
    assert perfect.error_increase == 0
    worse = Scores(variant="nf4", rows=9, root_mean_squared_error=0.1, reference_error=0.0)
    assert not judge(worse, Bounds(error_increase=10)).passed


def test_figures_are_what_was_measured_and_nothing_else():
    assert list(HEAD.figures) == ["accuracy", "accuracy_drop", "f1", "kl_divergence", "top1_agreement"]
    assert list(scores().figures) == ["perplexity", "perplexity_increase", "kl_divergence", "top1_agreement"]


def test_a_tuned_model_that_misses_its_bounds_takes_its_variants_with_it():
    gates = Gates(perplexity_increase=0.5, tuned=Bounds(perplexity_increase=-0.1))
    verdicts = judge_all({"dense": scores("dense"), "tuned": scores("tuned"), "nf4": scores("nf4")}, gates)
    assert verdicts["dense"].passed
    assert not verdicts["tuned"].passed
    assert verdicts["nf4"].misses[0].startswith("tuned: perplexity_increase 0.02, bound at most -0.1")


def test_a_report_is_read_as_it_was_written(tmp_path):
    write_report(tmp_path, [scores("dense"), scores("nf4")])
    assert read_report(tmp_path) == {"dense": scores("dense"), "nf4": scores("nf4")}


def test_the_report_of_a_head_names_only_what_was_measured(tmp_path):
    write_report(tmp_path, [HEAD, REGRESSOR])
    assert "perplexity" not in (tmp_path / "report.json").read_text()
    write_report(tmp_path, [HEAD])
    assert read_report(tmp_path) == {"nf4": HEAD}


def test_a_report_from_before_heads_were_judged_is_still_read(tmp_path):
    row = {
        "variant": "dense", "reference": None, "tokens": 7, "perplexity": 3.0, "reference_perplexity": None,
        "kl_divergence": None, "top1_agreement": None,
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps({"scores": [row]}))
    assert read_report(tmp_path)["dense"] == Scores(variant="dense", tokens=7, perplexity=3.0)


def test_a_damaged_report_is_one_sentence(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(StoreCorrupt):
        read_report(tmp_path)
