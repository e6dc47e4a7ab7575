"""A projector on a frozen backbone: its layer, its losses, the model of the two, through transformers' Trainer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    MarianConfig,
    MarianModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)  # fmt: skip
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import validate_quantization_for_training

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NonFinite, RecipeError, UnsupportedFormat
from pipeline.labelled import PairExample, padded_ids, padded_pairs
from pipeline.pairing import WEIGHTS, carry, seal
from pipeline.sections import Projector
from pipeline.training import load_projected
from pipeline.training.projected import lay_beside, read_projector, write_projector
from pipeline.training.projector import ProjectedModel, ProjectorLayer, contrastive, describe
from tests.training.feature_runs import (
    CLASSES,
    HIDDEN,
    arguments,
    backbone,
    cached,
    description,
    loaded,
    same,
    toy_rows,
    trained_on,
    weights,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return backbone(tmp_path_factory.mktemp("backbone") / "model")


class Collated:
    """Trainer's collator for (ids, label): padded on the right to 64 tokens."""

    def __call__(self, batch):
        found = padded_ids([ids for ids, _ in batch], pad_token=0, length=64)
        return {**found, "labels": torch.tensor([label for _, label in batch])}


def trainer(model, rows, run, *callbacks, **options):
    made = Trainer(model=model, args=run, train_dataset=rows, data_collator=Collated(), callbacks=list(callbacks),
                   **options)  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def accuracy(layer, features, labels):
    with torch.no_grad():
        return float((layer(features).argmax(1) == torch.tensor(labels)).float().mean())


def test_a_layer_begins_from_its_seed_alone_and_leaves_the_random_state_as_it_was():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = weights(ProjectorLayer(description(kind="mlp"), seed=5))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(weights(ProjectorLayer(description(kind="mlp"), seed=5)), one)
    assert not same(weights(ProjectorLayer(description(kind="mlp"), seed=6)), one)


def test_an_mlp_is_two_matrices_with_gelu_between_and_both_kinds_give_float32():
    layer = ProjectorLayer(description(kind="mlp", hidden_features=7))
    features = torch.randn(2, HIDDEN)
    inner = functional.gelu(features @ layer.hidden.weight.T + layer.hidden.bias)
    torch.testing.assert_close(layer(features), inner @ layer.output.weight.T + layer.output.bias)
    for kind in ("linear", "mlp"):
        found = ProjectorLayer(description(kind=kind))(features.to(torch.bfloat16))
        assert (found.dtype, found.shape) == (torch.float32, (2, 3))


def test_out_features_are_left_to_the_task_or_fit_it():
    assert description().out_features == 3
    assert description(out_features=5).out_features == 5
    assert description(task="regression", classes=None).out_features == 1
    assert description(task="pairs", classes=None).out_features == HIDDEN
    assert description(task="pairs", classes=None, out_features=8).out_features == 8
    assert description(kind="mlp").hidden_features == HIDDEN
    for task, given, classes in (("classification", 2, CLASSES), ("regression", 3, None)):
        with pytest.raises(RecipeError, match=rf"out_features is {given}, but the rows want \d for {task}"):
            describe(Projector(out_features=given), in_features=HIDDEN, task=task, classes=classes)


def test_the_contrastive_loss_is_the_cross_entropy_of_cosines_and_knows_hard_negatives():
    anchors, others = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    similar, loss = contrastive(anchors, others)
    assert similar.tolist() == [[20.0, 0.0], [0.0, 20.0]]
    assert loss.item() == pytest.approx(torch.log1p(torch.exp(torch.tensor(-20.0))).item(), abs=1e-6)
    _, harder = contrastive(anchors, torch.cat([others, torch.tensor([[1.0, 0.0]])]))
    assert harder.item() == pytest.approx(0.5 * torch.log(torch.tensor(2.0)).item(), abs=1e-5)


def test_the_model_pools_projects_and_judges_by_task(folder):
    model = ProjectedModel(loaded(folder), description(pooling="mean"))
    batch = padded_ids([[5, 6, 7], [8]], pad_token=0)
    hidden = loaded(folder).model(**batch).last_hidden_state
    by_hand = torch.stack([hidden[0].mean(0), hidden[1, 0]])
    output = model(**batch, labels=torch.tensor([2, 0]))
    torch.testing.assert_close(output.logits, model.projector.layer(by_hand))
    torch.testing.assert_close(output.loss, functional.cross_entropy(output.logits, torch.tensor([2, 0])))
    assert model(**batch).loss is None

    scores = ProjectedModel(loaded(folder), description(task="regression", classes=None))
    output = scores(**batch, labels=torch.tensor([1.5, -2.0]))
    torch.testing.assert_close(output.loss, ((output.logits[:, 0] - torch.tensor([1.5, -2.0])) ** 2).mean())


def test_left_padding_gives_the_feature_of_the_last_real_token_too(folder):
    model = ProjectedModel(loaded(folder), description())
    right, left = (
        model(torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])),
        model(torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])),
    )
    torch.testing.assert_close(right.logits, left.logits, rtol=1e-4, atol=1e-5)


def test_the_backbone_is_frozen_in_evaluation_mode_and_without_gradients(tmp_path):
    config = BertConfig(vocab_size=99, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, hidden_dropout_prob=0.5)  # fmt: skip
    model = ProjectedModel(BertModel(config), description(pooling="cls")).train()
    assert model.training
    assert not any(module.training for module in model.backbone.modules())
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == [
        "projector.layer.output.weight", "projector.layer.output.bias",
    ]  # fmt: skip
    batch = padded_ids([[5, 6, 7], [8, 9]], pad_token=0)
    assert torch.equal(model(**batch).logits, model(**batch).logits)  # no dropout
    assert not model.features(**batch).requires_grad
    model.backbone.encoder.layer[0].output.dense.weight.requires_grad_()
    model.train()
    assert all(module.training for module in model.backbone.modules())
    assert model.features(**batch).requires_grad


def test_models_without_hidden_states_for_tokens_are_refused(folder):
    marian = MarianConfig(vocab_size=99, d_model=HIDDEN, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                          decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                          pad_token_id=0, decoder_start_token_id=1)  # fmt: skip
    with pytest.raises(UnsupportedFormat, match="encoder with a decoder"):
        ProjectedModel(MarianModel(marian), description())
    picture = ViTConfig(hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                        image_size=32)  # fmt: skip
    with pytest.raises(UnsupportedFormat, match="no hidden states of a stated size for token ids"):
        ProjectedModel(ViTModel(picture), description())
    wide = describe(Projector(), in_features=32, task="classification", classes=CLASSES)
    with pytest.raises(UnsupportedFormat, match="takes 32 values, the backbone's hidden states have 64"):
        ProjectedModel(loaded(folder), wide)


def test_a_base_model_and_a_language_model_give_the_same_features(folder):
    batch = padded_ids([[5, 6, 7], [8]], pad_token=0)
    one = ProjectedModel(loaded(folder), description())
    two = ProjectedModel(AutoModel.from_pretrained(folder, dtype=torch.float32), description())
    assert torch.equal(one.features(**batch), two.features(**batch))
    assert not any("lm_head" in name for name, _ in one.named_parameters())


def test_trainers_guard_passes_a_bf16_backbone_untouched_and_refuses_a_quantized_one(folder):
    model = ProjectedModel(loaded(folder, torch.bfloat16), description())
    validate_quantization_for_training(model)
    assert not model.is_quantized
    assert not hasattr(model, "_hf_peft_config_loaded")
    packed = loaded(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(ProjectedModel(packed, description()))


def test_trainer_trains_the_projector_of_a_bf16_backbone_and_nothing_else(folder, tmp_path):
    model = ProjectedModel(loaded(folder, torch.bfloat16), description())
    before = weights(model.backbone)
    rows = list(zip(*toy_rows(), strict=True))
    made = trainer(model, rows, arguments(tmp_path, num_train_epochs=6))
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert same(weights(model.backbone), before)


def test_trainer_trains_pairs_some_with_hard_negatives(folder, tmp_path):
    texts, _ = toy_rows(48, seed=3, shortest=6, longest=12)
    rows = [
        PairExample(anchor=text[:4], positive=text[3:], negative=texts[i - 1] if i % 3 == 0 else None)
        for i, text in enumerate(texts)
    ]
    model = ProjectedModel(loaded(folder), description(task="pairs", classes=None, pooling="mean", kind="mlp"))
    run = arguments(tmp_path, num_train_epochs=20, per_device_train_batch_size=12)
    made = Trainer(
        model=model, args=run, train_dataset=rows, eval_dataset=rows,
        data_collator=partial(padded_pairs, pad_token=0),
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < 0.7 * before


def test_trainers_checkpoints_hold_what_trains_alone_and_resume_to_the_same_bits(folder, tmp_path, caplog):
    rows = list(zip(*toy_rows(), strict=True))

    class Dies(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_):
            if state.global_step == 8:
                raise KeyboardInterrupt

    def made(place, *callbacks):
        model = ProjectedModel(loaded(folder), description())
        return model, trainer(model, rows, arguments(place, num_train_epochs=2, save_steps=5), *callbacks)

    whole, run = made(tmp_path / "whole")
    run.train()
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cut", Dies())[1].train()
    checkpoint = tmp_path / "cut" / "checkpoint-5"
    names = ["projector.layer.output.bias", "projector.layer.output.weight"]
    assert sorted(load_file(checkpoint / "model.safetensors")) == names
    resumed, run = made(tmp_path / "cut")
    run.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(resumed.projector), weights(whole.projector))
    assert "missing keys" not in caplog.text


def test_trainer_and_cached_features_reach_the_same_accuracy(folder, tmp_path):
    rows, labels = toy_rows(192)
    run = {"num_train_epochs": 8}
    model = ProjectedModel(loaded(folder), description(), layer=ProjectorLayer(description(), seed=1))
    trainer(model, list(zip(rows, labels, strict=True)), arguments(tmp_path / "a", **run)).train()
    found = cached(loaded(folder), rows, tmp_path / "features")
    layer, fitted = trained_on(found, labels, arguments(tmp_path / "b", **run), seed=1)
    unseen, truth = toy_rows(96, seed=9)
    fresh = cached(loaded(folder), unseen, tmp_path / "features").pooled(torch.arange(96))
    one, two = accuracy(model.projector.layer, fresh, truth), accuracy(layer, fresh, truth)
    assert min(one, two) > 0.95
    assert abs(one - two) <= 0.02
    assert fitted.trainable_parameters == sum(weight.numel() for weight in model.projector.parameters())


def test_a_projected_folder_loads_with_one_call_dense_and_quantized(folder, tmp_path):
    layer = ProjectorLayer(description(kind="mlp"), seed=3)
    trained = tmp_path / "trained"
    trained.mkdir()
    write_projector(trained, layer, description(kind="mlp"))
    dense = backbone(tmp_path / "dense")
    carry(trained, dense)
    batch = padded_ids([[5, 6, 7], [8]], pad_token=0)
    model = load_projected(dense)
    expected = ProjectedModel(loaded(folder), description(kind="mlp"), layer=layer)
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
    assert model.description.classes == CLASSES

    packed = tmp_path / "packed"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    loaded(folder, quantization_config=config).save_pretrained(packed)
    carry(trained, packed)
    model = load_projected(str(packed))
    assert model.is_quantized
    logits = model(**batch).logits
    assert logits.dtype == torch.float32
    assert (logits - expected(**batch).logits).abs().max() < 0.5


def test_a_swapped_or_damaged_projector_is_refused_by_the_one_call(tmp_path):
    folder = backbone(tmp_path / "model")
    write_projector(folder, ProjectorLayer(description(), seed=1), description())
    seal(folder)
    other = tmp_path / "other"
    other.mkdir()
    write_projector(other, ProjectorLayer(description(), seed=2), description())
    (folder / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match=r"projector\.safetensors was changed"):
        load_projected(folder)
    write_projector(other, ProjectorLayer(description(kind="mlp")), description())
    with pytest.raises(CheckpointError, match=r"is not what projector\.json says"):
        read_projector(other)


def test_a_projector_that_is_not_finite_is_never_written(tmp_path):
    layer = ProjectorLayer(description())
    with torch.no_grad():
        layer.output.bias[0] = torch.nan
    with pytest.raises(NonFinite, match=r"output\.bias holds NaN"):
        write_projector(tmp_path, layer, description())
    assert list(tmp_path.iterdir()) == []


def test_a_projector_is_laid_beside_a_backbone_of_several_shards(folder, tmp_path):
    loaded(folder).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    base = Checkpoint.open(tmp_path / "sharded")
    assert len(base.shards) > 1
    for part in ("projector", "pair"):
        (tmp_path / part).mkdir()
    layer = ProjectorLayer(description(), seed=3)
    write_projector(tmp_path / "projector", layer, description())
    lay_beside(base, tmp_path / "projector", tmp_path / "pair")
    assert same(weights(load_projected(tmp_path / "pair").projector.layer), weights(layer))
