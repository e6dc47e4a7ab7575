"""A model beside its reference, on the same rows, in a process of their own."""

from __future__ import annotations

from typing import Any

import torch

from pipeline import progress
from pipeline.encoding import Sequence, encode, load_tokenizer, padded
from pipeline.errors import DataError, NonFinite
from pipeline.evaluation.figures import Totals, add
from pipeline.evaluation.load import load_model
from pipeline.evaluation.tasks import Comparison
from pipeline.gates import Scores
from pipeline.rows import read_rows

LOGIT_BYTES = 2**26  # float32 logits of one batch


def compare(task: Comparison) -> Scores:
    """Load both models from their folders and count every token; raise NonFinite where the reference is broken."""
    tokenizer = load_tokenizer(task.path, trust_remote_code=task.trust_remote_code)
    sequences = encode(read_rows(task.data), tokenizer, sequence_length=task.sequence_length).items
    model = load_model(task.path, trust_remote_code=task.trust_remote_code)
    other = load_model(task.reference_path, trust_remote_code=task.trust_remote_code) if task.reference_path else None
    totals, reference = _run(task, model, other, sequences)
    if not totals.tokens:
        raise DataError(f"{task.data.path}: no token is left to predict; give rows of at least two tokens")
    if other is not None and not torch.isfinite(torch.tensor(reference.negative_log_likelihood)):
        raise NonFinite(f"{task.reference}: its loss on {task.data.path} is not finite; the reference itself is broken")
    return Scores(
        variant=task.variant,
        reference=task.reference,
        tokens=totals.tokens,
        perplexity=totals.perplexity,
        reference_perplexity=reference.perplexity if other is not None else None,
        kl_divergence=totals.divergence / totals.tokens if other is not None else None,
        top1_agreement=totals.agreeing / totals.tokens if other is not None else None,
    )


@torch.inference_mode()
def _run(task: Comparison, model: Any, other: Any, sequences: list[Sequence]) -> tuple[Totals, Totals]:
    totals, reference = Totals(), Totals()
    size = max(1, LOGIT_BYTES // (4 * task.sequence_length * model.config.vocab_size))
    batches = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    for done, batch in enumerate(batches, start=1):
        given = {name: tensor.to(model.device) for name, tensor in padded(batch, pad_token=0).items()}
        labels = given.pop("labels")
        wanted = other(**given).logits if other is not None else None
        logits = model(**given).logits
        add(totals, logits, labels, wanted)
        if wanted is not None:
            add(reference, wanted, labels, None)
        progress.step(f"evaluate {task.variant}", done=done, total=len(batches), unit="batches")
    return totals, reference
