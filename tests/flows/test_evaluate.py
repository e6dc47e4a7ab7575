"""`requant evaluate` prints the figures that say something of the models it is given."""

from __future__ import annotations

import json

import pytest

from flows import cli
from tests.classifiers import LABELS, tiny_head


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_head(folder / "model", "LlamaForSequenceClassification", pad_token_id=None)
    rows = [{"body": f"row {i} " * (1 + i % 3), "mood": LABELS[i % 3]} for i in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text('{"text": "a row"}\n')
    return folder


def test_a_classifier_has_accuracy_f1_and_beside_a_reference_divergence_and_agreement(root, capsys):
    arguments = ["evaluate", f"{root}/model", "--data", f"{root}/rows.jsonl", "--field", "body", "--label", "mood"]
    assert cli.run([*arguments, "--reference", f"{root}/model", "--json"]) == 0
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    assert list(score) == ["model", "rows", "accuracy", "accuracy_drop", "f1", "kl_divergence", "top1_agreement"]
    assert (score["rows"], score["accuracy_drop"], score["top1_agreement"]) == (9, 0, 1)
    assert cli.run(arguments) == 0
    table = capsys.readouterr().out
    assert "accuracy" in table
    assert "perplexity" not in table
    assert "kl_divergence" not in table


def test_rows_of_another_kind_are_refused_before_a_model_loads(root, capsys):
    assert cli.run(["evaluate", f"{root}/model", "--data", f"{root}/text.jsonl"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds text rows" in said
    assert "is a model for classification; name rows of a text and its label" in said
