"""Rows that share a sequence are as good as alone, in whatever model is trained."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from pipeline.encoding import IGNORED, encode, padded
from pipeline.errors import RecipeError
from pipeline.packing import best_fit, require_apart
from pipeline.rows import Completion
from pipeline.training.arguments import training_arguments
from pipeline.training.checks import Expectation
from pipeline.training.trainer import Course, train
from tests.checkpoints import tiny_llama, tiny_tokenizer

ROWS = [
    Completion(place=f"line {i}", prompt="b" * (i % 3), completion="in the end, " * (1 + i % 4) + str(i))
    for i in range(9)
]
LIMIT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("packing") / "llama", dtype="float32")


@pytest.fixture(params=["sdpa", "eager"])
def model(request, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=request.param, dtype=torch.float32)
    # Sharper than a fresh model's attention, so that a look at another row would show.
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(20)
    return model.eval()


def segments(sequence):
    """Where each row of a packed sequence begins and ends."""
    starts = [i for i, position in enumerate(sequence.position_ids) if position == 0]
    return list(zip(starts, [*starts[1:], len(sequence.input_ids)], strict=True))


@torch.inference_mode()
def test_packed_rows_have_the_logits_and_the_loss_that_they_have_alone(model):
    tokenizer = tiny_tokenizer()
    alone = encode(ROWS, tokenizer, sequence_length=LIMIT).items
    packed = encode(ROWS, tokenizer, sequence_length=LIMIT, packing=True).items
    assert len(packed) < len(alone)
    batch = padded(packed, pad_token=0)
    assert len({len(sequence.input_ids) for sequence in packed}) > 1, "some sequence is padded"
    together = model(**batch, use_cache=False)
    wanted = {tuple(row.input_ids): model(input_ids=torch.tensor([row.input_ids])).logits[0] for row in alone}
    for sequence, logits in zip(packed, together.logits, strict=True):
        for start, end in segments(sequence):
            torch.testing.assert_close(
                logits[start:end], wanted.pop(tuple(sequence.input_ids[start:end])), atol=2e-5, rtol=1e-4
            )
    assert not wanted
    plain = model(**padded(alone, pad_token=0), use_cache=False)
    torch.testing.assert_close(together.loss, plain.loss, atol=1e-6, rtol=1e-6)
    judged = (batch["labels"][:, 1:] != IGNORED).sum().item()
    assert judged == sum(row.judged for row in alone) == sum(sequence.judged for sequence in packed)


@torch.inference_mode()
def test_without_fresh_positions_the_same_rows_would_see_each_other(model):
    """What the test above would find, were rows not kept apart."""
    batch = padded(encode(ROWS, tiny_tokenizer(), sequence_length=LIMIT, packing=True).items, pad_token=0)
    apart = model(**batch, use_cache=False).loss
    del batch["position_ids"]
    assert abs(model(**batch, use_cache=False).loss - apart) > 1e-4


def test_trainer_computes_the_same_loss_on_packed_rows(folder, tmp_path):
    tokenizer = tiny_tokenizer()
    losses = []
    for packing in (False, True):
        sequences = encode(ROWS, tokenizer, sequence_length=LIMIT, packing=packing).items
        given = {"max_steps": 1, "per_device_train_batch_size": len(sequences), "use_cpu": True}
        arguments = training_arguments(given, folder=tmp_path / str(packing), seed=0, mixed=False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = Expectation(method="full", trainable=lambda _: True)
        course = Course(examples=sequences, collate=partial(padded, pad_token=0), expected=expected)
        losses.append(train(partial(lambda made: made, model), course, arguments).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
def test_every_row_is_in_one_sequence_that_holds_it_and_no_two_sequences_fit_together(lengths, capacity):
    together = best_fit(lengths, capacity)
    assert sorted(row for rows in together for row in rows) == list(range(len(lengths)))
    assert together == sorted(sorted(rows) for rows in together)
    loads = sorted(sum(lengths[row] for row in rows) for rows in together)
    assert all(load <= capacity for load in loads)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity
    assert best_fit(list(lengths), capacity) == together


def test_a_row_goes_where_it_leaves_the_least_room():
    assert best_fit([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert best_fit([], 10) == []


def test_a_model_whose_masks_heed_positions_may_be_trained_on_packed_rows(model):
    model.train()
    require_apart(model)
    require_apart(model.to(torch.bfloat16))
    require_apart(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=256)))
    assert model.training


def test_a_model_that_lets_rows_see_each_other_is_refused():
    with pytest.raises(RecipeError, match=r"train.packing: MambaForCausalLM (lets rows|takes no position_ids)"):
        require_apart(MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=256, state_size=8)))
    with pytest.raises(RecipeError, match=r"train.packing: BloomForCausalLM (lets rows|takes no position_ids)"):
        require_apart(BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=256)))


def test_an_attention_that_looks_at_no_mask_is_refused(model, monkeypatch):
    """As flash attention is with more than one packed sequence at a time."""
    real = model.forward

    def forward(*, position_ids, **given):
        return real(**given)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(RecipeError, match=r"train.packing: LlamaForCausalLM lets rows in one sequence see each other"):
        require_apart(model)
