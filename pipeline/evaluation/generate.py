"""Text from a model, for a first look at it."""

from __future__ import annotations

import torch

from pipeline.encoding import load_tokenizer
from pipeline.evaluation.load import load_model
from pipeline.evaluation.tasks import Prompt


@torch.inference_mode()
def generate(asked: Prompt) -> str:
    """What the model says after the prompt, always taking the likeliest token."""
    tokenizer = load_tokenizer(asked.path, trust_remote_code=asked.trust_remote_code)
    model = load_model(asked.path, trust_remote_code=asked.trust_remote_code)
    given = tokenizer(asked.text, return_tensors="pt").to(model.device)
    tokens = model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=asked.max_new_tokens,
        do_sample=False,
    )
    said: str = tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return said
