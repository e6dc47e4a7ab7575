"""Whether the dense model says what the packed one says: their logits on a text, before the dense one is handed over.

The two are not equal to the last bit: the packed model computes in 16 bits, and some formats round activations too. How
much that may change is measured, not assumed: the dense model runs once more with exactly that rounding, and the packed
model may lie MARGIN times as far from it. A module that was dequantized wrongly lies orders of magnitude further.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import Checkpoint, read_json
from pipeline.encoding import load_tokenizer
from pipeline.errors import InputError, ReloadMismatch
from pipeline.evaluation.load import load_model
from pipeline.evaluation.rounding import activations_of, rounding
from pipeline.model_class import class_of, lacks

MARGIN = 4.0
FLOOR = 1e-6  # nats: float32 sums in another order
MOST_TOKENS = 512
PART = 16  # tokens
TEXT = """\
def gcd(a, b):
    \"\"\"Greatest common divisor of two integers, after Euclid.\"\"\"
    while b:
        a, b = b, a % b
    return abs(a)

The quick brown fox jumps over the lazy dog. In 1815, M. Charles-Francois-Bienvenu Myriel was Bishop of D. He was an old
man of about seventy-five years of age; he had occupied the see of D. since 1806. Water boils at 100 degrees Celsius at
sea level, which is 212 degrees Fahrenheit, and freezes at 0 degrees, which is 32. SELECT name, COUNT(*) FROM orders
WHERE total > 99.95 GROUP BY name ORDER BY 2 DESC; for (int i = 0; i < n; i++) { sum += values[i] * weights[i]; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """KL(packed || dense) in nats per token, the most that the format's rounding explains, and over how many tokens."""

    kl_divergence: float
    bound: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The packed model's answer to a text: logits [N, V] float32 for the token ids [1, T], of `model_class`.

    `activations` is what the packed model rounds its layers' inputs to.
    """

    tokens: Tensor
    logits: Tensor
    activations: str
    model_class: Any
    trust_remote_code: bool

    @staticmethod
    def ask(source: Path, *, text: str = TEXT, trust_remote_code: bool = False) -> Question:
        """Load the packed model as its users do; raise InputError where transformers cannot, or it has no logits."""
        checkpoint = Checkpoint.open(source)
        with _described(checkpoint) as folder:
            config = read_json(folder / "config.json")
            model_class = class_of(config, trust_remote_code=trust_remote_code)
            if reason := lacks(model_class):
                raise InputError(
                    f"{source}: --verify compares logits, but {model_class.__name__} {reason}; leave out --verify"
                )
            tokens = _tokens(folder, text, config, trust_remote_code=trust_remote_code)
        try:
            model = load_model(source, model_class=model_class, trust_remote_code=trust_remote_code)
            logits = _logits(model, tokens)
        except Exception as error:  # a quantizer may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"{source}: its logits cannot be had for --verify, since transformers cannot run it here ({reason}); "
                "leave out --verify"
            ) from error
        return Question(
            tokens=tokens, logits=logits, activations=activations_of(checkpoint), model_class=model_class,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip

    def compare(self, dense: Path) -> Agreement:
        """The dense model's answer beside it; raise ReloadMismatch where they differ by more than rounding."""
        model = load_model(dense, model_class=self.model_class, trust_remote_code=self.trust_remote_code)
        exact = _logits(model, self.tokens)
        linears = [module for module in model.to(torch.bfloat16).modules() if isinstance(module, torch.nn.Linear)]
        with rounding(linears, self.activations):
            rounded = _logits(model, self.tokens)
        found = Agreement(
            kl_divergence=_divergence(self.logits, exact),
            bound=MARGIN * _divergence(rounded, exact) + FLOOR,
            tokens=self.tokens.shape[1],
        )
        if not found.kl_divergence <= found.bound:  # also where it is NaN
            raise ReloadMismatch(
                f"{dense.name}: its logits differ from the source's by a KL divergence of {found.kl_divergence:.3g} "
                f"nats per token, more than the {found.bound:.3g} that rounding explains; the source is damaged or its "
                "config.json does not describe it"
            )
        return found


@contextmanager
def _described(checkpoint: Checkpoint) -> Iterator[Path]:
    """The folder with a checkpoint's config.json and tokenizer."""
    if not checkpoint.is_gguf:
        yield checkpoint.path
        return
    from pipeline.gguf_rebuild import rebuild

    with tempfile.TemporaryDirectory() as folder:
        rebuild(checkpoint, Path(folder))
        yield Path(folder)


def _tokens(folder: Path, text: str, config: Mapping[str, Any], *, trust_remote_code: bool) -> Tensor:
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    longest = config.get("max_position_embeddings") or config.get("n_positions") or MOST_TOKENS
    # RoBERTa's kin count the two positions that no token has.
    ids = tokenizer(text)["input_ids"][: min(MOST_TOKENS, max(1, longest - 2))]
    if not ids:
        raise InputError(f"{folder}: its tokenizer makes no token of the text; give another with --text")
    return torch.tensor([ids])


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    """The logits [N, V] of each position; of each PART of the text for a model that has one answer for all of it."""
    tokens = tokens.to(model.device)
    found: Tensor = _answer(model, tokens)
    if found.ndim == 2:  # noqa: PLR2004 - [1, V]
        parts = torch.split(tokens, PART, dim=1)
        found = torch.stack([_answer(model, part)[0] for part in parts])[None]
    found = found[0].float().cpu()
    # A single number is that of two classes whose other logit is zero.
    return found if found.shape[-1] > 1 else torch.nn.functional.pad(found, (0, 1))


def _answer(model: Any, tokens: Tensor) -> Tensor:
    also = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=tokens, **also).logits
    return found


def _divergence(first: Tensor, second: Tensor) -> float:
    """Mean over tokens of KL(first || second), logits [T, V]."""
    p, q = torch.log_softmax(first.double(), -1), torch.log_softmax(second.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())
