"""What compare says of a model is what its rows, asked one by one through transformers, say."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline.errors import DataError, NonFinite
from pipeline.evaluation.tasks import Comparison
from pipeline.gates import Scores
from pipeline.judging.compare import compare
from pipeline.sections import Data
from pipeline.training import load_projected
from tests.checkpoints import tiny_llama, tiny_tokenizer
from tests.classifiers import LABELS, tiny_head, tiny_projected

TEXTS = [f"the sum of {i} and {'another ' * (i % 5)}{i * i} is on the left" for i in range(24)]
TAGGED = [{"tokens": text.split(), "tags": [LABELS[len(word) % 3] for word in text.split()]} for text in TEXTS]


def rows_file(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(path, data, reference=None, **keys):
    return compare(
        Comparison(
            variant="nf4", path=path, reference="tuned" if reference else None, reference_path=reference,
            data=Data(path=str(data), **keys), sequence_length=128,
        )
    )  # fmt: skip


def answer(model, text):
    """Logits of one text alone, which nothing pads."""
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()


def divergence(reference, model):
    p, q = torch.log_softmax(reference.double(), -1), torch.log_softmax(model.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def noisy(folder, source):
    """The model with its weights moved a little, as a quantized one's are."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {name: t + 0.05 * t.std() * torch.randn(t.shape, generator=generator) if t.ndim > 1 else t
             for name, t in tensors.items()}  # fmt: skip
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("LlamaForSequenceClassification", {}),
        ("LlamaForSequenceClassification", {"pad_token_id": None}),
        ("LlamaForSequenceClassification", {"pad_token_id": -1}),
        ("BertForSequenceClassification", {}),
    ],
)
def test_a_classifier_is_judged_as_its_rows_are_one_by_one(tmp_path, architecture, keys):
    tuned = tiny_head(tmp_path / "tuned", architecture, **keys)
    variant = noisy(tmp_path / "variant", tuned)
    classes = [getattr(transformers, architecture).from_pretrained(folder).eval() for folder in (variant, tuned)]
    found, wanted = (torch.stack([answer(model, text) for text in TEXTS]) for model in classes)
    truth = torch.tensor([int(row.argmax()) for row in wanted])
    truth[::4] = (truth[::4] + 1) % 3  # so that the reference too is wrong about a quarter
    data = rows_file(tmp_path, [{"text": t, "label": LABELS[i]} for t, i in zip(TEXTS, truth, strict=True)])
    scores = ask(variant, data, tuned)
    assert scores.rows == 24
    assert scores.reference_accuracy == 0.75
    assert scores.accuracy == pytest.approx(float((found.argmax(-1) == truth).double().mean()))
    assert scores.kl_divergence == pytest.approx(divergence(wanted, found), rel=1e-3)
    assert scores.top1_agreement == pytest.approx(float((found.argmax(-1) == wanted.argmax(-1)).double().mean()))
    assert 0 < scores.f1 < 1
    assert scores.perplexity is None


def test_a_row_that_ends_with_the_tokenizers_padding_token_is_read_to_its_end(tmp_path):
    """A decoder's classifier looks for the last token that is no padding; where it is free to choose, none is lost."""
    tuned = tiny_head(tmp_path / "tuned", "LlamaForSequenceClassification", pad_token_id=None)
    texts = [text + "<pad>" for text in TEXTS]
    model = transformers.LlamaForSequenceClassification.from_pretrained(tuned).eval()
    truth = [int(answer(model, text).argmax()) for text in texts]
    data = rows_file(tmp_path, [{"text": t, "label": LABELS[i]} for t, i in zip(texts, truth, strict=True)])
    assert len(set(truth)) > 1
    assert ask(tuned, data).accuracy == 1


def test_labels_without_names_may_be_given_as_numbers(tmp_path):
    unnamed = tiny_head(tmp_path / "model", "BertForSequenceClassification", labels=("LABEL_0", "LABEL_1"))
    numbers = rows_file(tmp_path, [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)])
    found = ask(unnamed, numbers)
    names = rows_file(tmp_path, [{"text": text, "label": f"LABEL_{i % 2}"} for i, text in enumerate(TEXTS)])
    assert ask(unnamed, names) == found


def test_a_regressor_is_judged_by_its_error(tmp_path):
    tuned = tiny_head(tmp_path / "tuned", "LlamaForSequenceClassification", labels=("score",))
    variant = noisy(tmp_path / "variant", tuned)
    right, found = (
        torch.cat([answer(transformers.LlamaForSequenceClassification.from_pretrained(folder).eval(), text)
                   for text in TEXTS]) for folder in (tuned, variant)
    )  # fmt: skip
    data = rows_file(tmp_path, [{"text": t, "label": float(v) + 1} for t, v in zip(TEXTS, right, strict=True)])
    scores = ask(variant, data, tuned)
    assert scores.reference_error == pytest.approx(1, rel=1e-4)
    assert scores.root_mean_squared_error == pytest.approx(float((found - right - 1).square().mean().sqrt()), rel=1e-3)
    assert scores.error_increase == pytest.approx(scores.root_mean_squared_error - 1, abs=1e-3)
    assert scores.accuracy is None


def test_whole_numbers_are_no_classes_for_a_regressor(tmp_path):
    tuned = tiny_head(tmp_path / "tuned", "BertForSequenceClassification", labels=("stars",))
    data = rows_file(tmp_path, [{"text": text, "label": i} for i, text in enumerate(TEXTS)])
    assert ask(tuned, data).root_mean_squared_error > 1


@pytest.mark.parametrize("architecture", ["LlamaForTokenClassification", "BertForTokenClassification"])
def test_a_tagger_is_judged_by_the_first_token_of_each_word(tmp_path, architecture):
    tuned = tiny_head(tmp_path / "tuned", architecture)
    variant = noisy(tmp_path / "variant", tuned)
    scores = ask(variant, rows_file(tmp_path, TAGGED), tuned)
    assert scores.tokens == sum(len(row["tokens"]) for row in TAGGED)
    assert scores.rows == 24
    assert 0 < scores.accuracy < 1
    assert 0 < scores.kl_divergence < 1
    assert scores.top1_agreement > 0.5
    alone = [ask(tuned, rows_file(tmp_path, [row])) for row in TAGGED]
    right = sum(score.accuracy * score.tokens for score in alone)
    assert scores.reference_accuracy == pytest.approx(right / scores.tokens)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_projected_classifier_is_judged_like_any_other(tmp_path, kind):
    tuned = tiny_projected(tmp_path / "tuned", "classification", classes=LABELS, kind=kind)
    model = load_projected(tuned)
    truth = [int(answer(model, text).argmax()) for text in TEXTS]
    data = rows_file(tmp_path, [{"text": t, "label": LABELS[i]} for t, i in zip(TEXTS, truth, strict=True)])
    scores = ask(tuned, data, tuned)
    assert (scores.accuracy, scores.accuracy_drop, scores.top1_agreement) == (1, 0, 1)
    assert scores.kl_divergence == pytest.approx(0, abs=1e-12)


def test_a_projected_regressor_is_judged_by_its_error(tmp_path):
    tuned = tiny_projected(tmp_path / "tuned", "regression")
    model = load_projected(tuned)
    rows = [{"text": text, "label": float(answer(model, text)[0]) + 2} for text in TEXTS]
    assert ask(tuned, rows_file(tmp_path, rows)).root_mean_squared_error == pytest.approx(2, rel=1e-4)


def test_pairs_are_judged_by_which_positive_is_nearest(tmp_path):
    tuned = tiny_projected(tmp_path / "tuned", "pairs")
    model = load_projected(tuned)
    positives = [f"{text}, as was said" for text in TEXTS]
    units = [torch.nn.functional.normalize(torch.stack([answer(model, t) for t in part]), dim=-1)
             for part in (TEXTS, positives)]  # fmt: skip
    right = float(((units[0] @ units[1].T).argmax(-1) == torch.arange(24)).double().mean())
    rows = [{"anchor": a, "positive": p} for a, p in zip(TEXTS, positives, strict=True)]
    scores = ask(tuned, rows_file(tmp_path, rows), tuned)
    assert 1 / 24 < scores.accuracy <= 1
    assert scores.accuracy == pytest.approx(right)
    assert (scores.accuracy_drop, scores.top1_agreement, scores.kl_divergence) == (0, 1, None)


def test_two_anchors_of_one_positive_are_both_right(tmp_path):
    tuned = tiny_projected(tmp_path / "tuned", "pairs")
    rows = [{"anchor": TEXTS[0], "positive": TEXTS[0]}, {"anchor": TEXTS[0], "positive": TEXTS[0]},
            {"anchor": TEXTS[1], "positive": TEXTS[1]}]  # fmt: skip
    assert ask(tuned, rows_file(tmp_path, rows)).accuracy == 1


def test_a_language_model_keeps_its_figures(tmp_path):
    dense = tiny_llama(tmp_path / "dense")
    scores = ask(dense, rows_file(tmp_path, [{"text": text} for text in TEXTS]), dense)
    assert scores.perplexity == scores.reference_perplexity
    assert scores.perplexity > 1
    assert scores.kl_divergence == pytest.approx(0, abs=1e-6)
    assert (scores.accuracy, scores.rows) == (None, None)


BERT = "BertForSequenceClassification"
TEXT, NAMED, MEASURED = {"text": "x"}, {"text": "x", "label": "a"}, {"text": "x", "label": 1.0}


@pytest.mark.parametrize(
    ("make", "row", "said"),
    [
        (lambda f: tiny_head(f, BERT), TEXT, r"holds text rows, but nf4 is a model for classification; .* its label"),
        (lambda f: tiny_head(f, "BertForTokenClassification"), NAMED, "tokens and the tag of each"),
        (tiny_llama, NAMED, "or read them as text with data.format"),
        (lambda f: tiny_projected(f, "pairs"), TEXT, "an anchor and its positive"),
        (lambda f: tiny_head(f, BERT, labels=("stars",)), TEXT, "a text and a number"),
        (lambda f: tiny_head(f, "BertForMaskedLM"), TEXT, "fills in masked tokens"),
        (lambda f: tiny_head(f, BERT, problem_type="multi_label_classification"), NAMED, "several labels"),
        (lambda f: tiny_head(f, BERT, problem_type="regression"), MEASURED, "gives 3 numbers"),
    ],
)
def test_rows_that_say_nothing_of_a_model_are_refused_in_a_sentence(tmp_path, make, row, said):
    with pytest.raises(DataError, match=said):
        ask(make(tmp_path / "model"), rows_file(tmp_path, [row]))


def test_a_model_is_not_compared_with_one_that_answers_something_else(tmp_path):
    head = tiny_head(tmp_path / "head", "BertForSequenceClassification")
    data = rows_file(tmp_path, [{"text": "x", "label": "good"}])
    with pytest.raises(DataError, match="is a model for classification, but tuned is one for language"):
        ask(head, data, tiny_llama(tmp_path / "llama"))
    with pytest.raises(DataError, match=r"chooses from bad, good, so-so, but tuned from no, yes"):
        ask(head, data, tiny_head(tmp_path / "other", "BertForSequenceClassification", labels=("no", "yes")))


@pytest.mark.parametrize(
    ("architecture", "weight"),
    [("BertForSequenceClassification", "classifier.weight"), ("LlamaForTokenClassification", "score.weight")],
)
def test_a_broken_model_has_no_finite_figure_and_a_broken_reference_stops_it(tmp_path, architecture, weight):
    tuned = tiny_head(tmp_path / "tuned", architecture)
    broken = noisy(tmp_path / "broken", tuned)
    tensors = load_file(broken / "model.safetensors")
    tensors[weight][0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    rows = TAGGED if "Token" in architecture else [{"text": text, "label": "good"} for text in TEXTS]
    data = rows_file(tmp_path, rows)
    scores = ask(broken, data, tuned)
    assert isinstance(scores, Scores)
    assert all(math.isnan(scores.figures[name]) for name in ("accuracy", "f1", "kl_divergence", "top1_agreement"))
    with pytest.raises(NonFinite, match="the reference itself is broken"):
        ask(tuned, data, broken)
