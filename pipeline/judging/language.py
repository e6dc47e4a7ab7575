"""A language model: how well it predicts the next token."""

from __future__ import annotations

from typing import Any

import torch

from pipeline import progress
from pipeline.encoding import Sequence, encode, padded
from pipeline.errors import DataError
from pipeline.evaluation.figures import Totals, add
from pipeline.gates import Scores
from pipeline.judging.question import Question

LOGIT_BYTES = 2**26  # float32 logits of one batch


def judge(question: Question) -> Scores:
    """Perplexity and, beside a reference, KL divergence and agreement; every token is counted once."""
    task = question.task
    sequences = encode(question.rows, question.tokenizer, sequence_length=task.sequence_length).items
    model = question.load(task.path)
    other = question.load(task.reference_path) if task.reference_path else None
    totals, reference = _run(question, model, other, sequences)
    if not totals.tokens:
        raise DataError(f"{task.data.path}: no token is left to predict; give rows of at least two tokens")
    if other is not None:
        question.check_reference(reference.negative_log_likelihood)
    return question.scores(
        tokens=totals.tokens,
        perplexity=totals.perplexity,
        reference_perplexity=reference.perplexity if other is not None else None,
        kl_divergence=totals.divergence / totals.tokens if other is not None else None,
        top1_agreement=totals.agreeing / totals.tokens if other is not None else None,
    )


@torch.inference_mode()
def _run(question: Question, model: Any, other: Any, sequences: list[Sequence]) -> tuple[Totals, Totals]:
    totals, reference = Totals(), Totals()
    vocabulary = model.config.get_text_config().vocab_size
    size = max(1, LOGIT_BYTES // (4 * question.task.sequence_length * vocabulary))
    batches = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    for done, batch in enumerate(batches, start=1):
        given = {name: tensor.to(model.device) for name, tensor in padded(batch, pad_token=0).items()}
        labels = given.pop("labels")
        wanted = other(**given).logits if other is not None else None
        logits = model(**given).logits
        add(totals, logits, labels, wanted)
        if wanted is not None:
            add(reference, wanted, labels, None)
        progress.step(f"evaluate {question.task.variant}", done=done, total=len(batches), unit="batches")
    return totals, reference
