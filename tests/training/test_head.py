"""The architecture's own head on a frozen base: through Trainer's forward pass, and replayed on cached features."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.trainer_utils import validate_quantization_for_training

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NonFinite, UnsupportedFormat
from pipeline.labelled import padded_ids
from pipeline.training.feature_loop import fit
from pipeline.training.head import WEIGHTS, head_weights, merge_head, prepare, write_head
from pipeline.training.model import load
from pipeline.training.replay import Replay, head_rows, kept_of
from pipeline.training.task import Task
from tests.training.feature_runs import CLASSES, HIDDEN, arguments, backbone, cached, loaded, same, toy_rows, weights

SMALL = {"vocab_size": 256, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "pad_token_id": 0}  # fmt: skip
GPT2 = GPT2Config(vocab_size=256, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, pad_token_id=0)
MODERN = {**SMALL, "max_position_embeddings": 128, "global_attn_every_n_layers": 1, "local_attention": 64}
BASES = {
    "llama": (None, "last position but 0"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2), "last position but 0"),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SMALL)), "first position"),
    "bert base": (lambda: BertModel(BertConfig(**SMALL)), "first position"),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**SMALL)), "first position"),
    "modernbert": (lambda: ModernBertForMaskedLM(ModernBertConfig(**MODERN, classifier_pooling="mean")),
                   "every position"),
}  # fmt: skip


def base(folder, name):
    if name == "llama":
        return backbone(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BASES[name][0]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: base(folder / name.replace(" ", "-"), name) for name in BASES}


def head(folder, *, task="classification", classes=CLASSES, dtype=torch.float32):
    made = load(Checkpoint.open(folder), Task(kind=task, classes=classes), dtype=dtype, seed=4, trust_remote_code=False)
    prepare(made)
    return made.model


def replayed(model, rows, labels, folder, *, task="classification"):
    """(the replay of the model, its rows for the loop, what was kept)."""
    kept = kept_of(model, rows, sequence_length=64, pad_token=0)
    found = cached(model, rows, folder, kept=kept)
    data = head_rows(found, labels, kept, tagging=task == "tagged", regression=task == "regression")
    return Replay(model).release(), data, kept


@pytest.mark.parametrize("name", BASES)
def test_the_head_alone_trains_and_a_pooler_that_the_checkpoint_lacks(bases, name):
    model = head(bases[name]).train()
    prefix = f"{model.base_model_prefix}."
    inside = [name for name in head_weights(model) if name.startswith(prefix)]
    assert inside == ([f"{prefix}pooler.dense.weight", f"{prefix}pooler.dense.bias"] if name == "bert" else [])
    assert all(weight.dtype == torch.float32 for weight in head_weights(model).values())
    assert len(head_weights(model)) > len(inside)
    assert not any(module.training for module in model.base_model.modules())
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert same(weights(model), weights(head(bases[name])))  # the new weights come from the seed
    validate_quantization_for_training(model)


@pytest.mark.parametrize("name", BASES)
def test_replayed_features_give_the_logits_of_the_real_forward_pass(bases, name, tmp_path):
    rows, labels = toy_rows(20)
    model = head(bases[name]).eval()
    with torch.no_grad():
        expected = model(**padded_ids(rows, pad_token=0, length=64)).logits
    replay, data, kept = replayed(model, rows, labels, tmp_path)
    assert kept.name == BASES[name][1]
    with torch.no_grad():
        output = replay.eval()(**data.batch(torch.arange(20)))
    torch.testing.assert_close(output.logits, expected, rtol=1e-3, atol=1e-4)


def test_a_real_token_that_is_the_paddings_is_passed_over_as_the_architecture_does(bases, tmp_path):
    model = head(bases["llama"]).eval()
    rows = [[5, 6, 7, 0], [8, 9, 0, 0], [5, 6, 7]]
    with torch.no_grad():
        expected = model(**padded_ids(rows, pad_token=0, length=64)).logits
    assert torch.equal(expected[0], expected[2])
    replay, data, _ = replayed(model, rows, [0, 1, 2], tmp_path)
    with torch.no_grad():
        output = replay.eval()(**data.batch(torch.arange(3)))
    torch.testing.assert_close(output.logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_label_of_a_tagged_row_is_judged_and_no_padding(bases, name, tmp_path):
    rows, _ = toy_rows(20)
    labels = [[-100 if token % 3 else token % 2 for token in row] for row in rows]
    model = head(bases[name], task="tagged", classes=("B", "O")).eval()
    batch = padded_ids(rows, pad_token=0, length=64)
    wanted = torch.full((20, 64), -100)
    for row, tags in zip(wanted, labels, strict=True):
        row[: len(tags)] = torch.tensor(tags)
    with torch.no_grad():
        expected = model(**batch, labels=wanted)
    replay, data, kept = replayed(model, rows, labels, tmp_path, task="tagged")
    assert kept.name == "every position"
    with torch.no_grad():
        output = replay.eval()(**data.batch(torch.arange(20)))
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)
    assert data.judged(torch.arange(20)) == int((wanted != -100).sum())
    assert data.judged(torch.tensor([3])) == int((wanted[3] != -100).sum())


@pytest.mark.parametrize("name", ["llama", "bert", "roberta", "modernbert"])
def test_a_head_learns_on_cached_features_what_trainer_would_see(bases, name, tmp_path):
    rows, labels = toy_rows(96, last=name == "llama")
    if name != "llama":
        rows = [[10 + label, *row] for row, label in zip(rows, labels, strict=True)]
    model = head(bases[name])
    replay, data, _ = replayed(model, rows, labels, tmp_path / "f")
    fitted = fit(replay, data, arguments(tmp_path / "run", num_train_epochs=12), validation=data)
    assert fitted.validation_accuracy > 0.9
    assert fitted.trainable_parameters == sum(weight.numel() for weight in head_weights(model).values())


def test_a_regression_and_tags_learn_too(bases, tmp_path):
    rows, labels = toy_rows(96)
    model = head(bases["llama"], task="regression", classes=None)
    assert model.config.num_labels == 1
    replay, data, _ = replayed(model, rows, [float(label) for label in labels], tmp_path / "a", task="regression")
    run = arguments(tmp_path / "run", num_train_epochs=20)
    assert fit(replay, data, run, validation=data).validation_loss < 0.3
    rows = [[10 + token % 8 for token in row] for row in rows]
    tags = [[token % 2 for token in row] for row in rows]
    model = head(bases["llama"], task="tagged", classes=("B", "O"))
    replay, data, _ = replayed(model, rows, tags, tmp_path / "b", task="tagged")
    assert (
        fit(replay, data, arguments(tmp_path / "tags", num_train_epochs=12), validation=data).validation_accuracy > 0.8
    )


def test_a_head_that_looks_at_more_than_hidden_states_is_sent_to_trainer(tmp_path):
    config = XLNetConfig(vocab_size=256, d_model=HIDDEN, n_layer=1, n_head=4, d_inner=96, pad_token_id=0)
    XLNetLMHeadModel(config).save_pretrained(tmp_path / "model")
    model = head(tmp_path / "model")  # it summarizes by the last position, padding or not
    rows, _ = toy_rows(8)
    with pytest.raises(UnsupportedFormat, match=r"looks at more than .*; set train\.engine: trainer"):
        kept_of(model, rows, sequence_length=64, pad_token=0)
    model(**padded_ids(rows, pad_token=0))  # its base model is back


@pytest.mark.parametrize("name", ["llama", "bert", "bert base", "roberta"])
def test_a_trained_head_laid_on_its_base_loads_in_transformers_with_nothing_missing(bases, name, tmp_path):
    rows, labels = toy_rows(24)
    model = head(bases[name])
    real = getattr(model, model.base_model_prefix)
    replay, data, _ = replayed(model, rows, labels, tmp_path / "f")
    fit(replay, data, arguments(tmp_path / "run"))
    for part in ("head", "tuned"):
        (tmp_path / part).mkdir()
    write_head(tmp_path / "head", model, bases[name])
    merge_head(Checkpoint.open(bases[name]), tmp_path / "head", tmp_path / "tuned")
    loaded_, found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not any(found.values()), found
    assert loaded_.config.id2label == dict(enumerate(CLASSES))
    stub = getattr(model, model.base_model_prefix)
    setattr(model, model.base_model_prefix, real)
    if getattr(stub, "pooler", None) is not None:
        assert real.pooler is stub.pooler
    batch = padded_ids(rows, pad_token=0, length=64)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded_.eval().float()(**batch).logits, model.eval()(**batch).logits, rtol=1e-3, atol=1e-3
        )


def test_the_bases_tensors_are_copied_byte_for_byte_and_its_own_head_is_left_out(bases, tmp_path):
    for part in ("head", "tuned"):
        (tmp_path / part).mkdir()
    write_head(tmp_path / "head", head(bases["llama"]), bases["llama"])
    merge_head(Checkpoint.open(bases["llama"]), tmp_path / "head", tmp_path / "tuned")
    before, after = (load_file(folder / "model.safetensors") for folder in (bases["llama"], tmp_path / "tuned"))
    assert before.keys() - after.keys() == {"lm_head.weight"}
    assert after.keys() - before.keys() == {"score.weight"}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() & after.keys())
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (tmp_path / "tuned" / "tokenizer.json").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_keeps_its_packed_bytes_under_a_dense_head(bases, tmp_path, bits):
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    packed = tmp_path / "packed"
    loaded(bases["llama"], "auto", quantization_config=config).save_pretrained(packed)
    rows, labels = toy_rows(24)
    model = head(packed)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    replay, data, _ = replayed(model, rows, labels, tmp_path / "f")
    fit(replay, data, arguments(tmp_path / "run"))
    for part in ("head", "tuned"):
        (tmp_path / part).mkdir()
    write_head(tmp_path / "head", model, packed)
    merge_head(Checkpoint.open(packed), tmp_path / "head", tmp_path / "tuned")
    tuned, found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not any(found.values()), found
    assert type(tuned.score) is torch.nn.Linear
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "tuned"))
    assert all(torch.equal(after[name], before[name]) for name in before.keys() & after.keys())
    torch.testing.assert_close(tuned.score.weight.float(), model.score.weight.detach(), rtol=1e-2, atol=1e-3)


def test_a_base_in_bf16_carries_a_head_in_float32(bases):
    model = head(bases["llama"], dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model(**padded_ids([[5, 6]], pad_token=0)).logits.dtype == torch.float32


def test_a_base_that_lacks_weights_is_refused_and_one_without_such_a_head_too(bases, tmp_path):
    folder = base(tmp_path / "llama", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"missing or unexpected key, such as model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        head(folder)
    config = json.loads((bases["llama"] / "config.json").read_text())
    other = base(tmp_path / "other", "llama")
    (other / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UnsupportedFormat, match="no AutoModelForTokenClassification for mamba; use method projector"):
        head(other, task="tagged")


def test_another_head_of_the_checkpoint_with_other_classes_gives_way_to_a_new_one(bases, tmp_path):
    model = AutoModelForTokenClassification.from_pretrained(bases["llama"], num_labels=9)
    model.save_pretrained(tmp_path)
    assert head(tmp_path, task="tagged").score.weight.shape == (3, HIDDEN)


def test_a_head_that_is_not_finite_is_never_written(bases, tmp_path):
    model = head(bases["llama"])
    with torch.no_grad():
        model.score.weight[0, 0] = torch.inf
    with pytest.raises(NonFinite, match=r"score\.weight holds NaN or infinity"):
        write_head(tmp_path, model, bases["llama"])
    assert not (tmp_path / WEIGHTS).exists()
