"""Whether the dense model says what the packed one says: their logits on a text, before the dense one is handed over.

The two are not equal to the last bit: the packed model computes in 16 bits, and some formats round activations too. How
much that may change is measured, not assumed: the dense model runs once more with exactly that rounding, and the packed
model may lie MARGIN times as far from it. A module that was dequantized wrongly lies orders of magnitude further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.catalog import format_of
from pipeline.checkpoint import Checkpoint
from pipeline.encoding import load_tokenizer
from pipeline.errors import InputError, ReloadMismatch
from pipeline.evaluation.load import load_model

MARGIN = 4.0
FLOOR = 1e-6  # nats: float32 sums in another order
MOST_TOKENS = 512
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
    """The packed model's answer to a text: logits [T, V] float32 for the token ids."""

    tokens: Tensor
    logits: Tensor
    activations: str
    trust_remote_code: bool

    @staticmethod
    def ask(source: Path, *, text: str = TEXT, trust_remote_code: bool = False) -> Question:
        """Load the packed model as its users do; raise InputError where transformers cannot."""
        checkpoint = Checkpoint.open(source)
        tokens = _tokens(source, text, trust_remote_code=trust_remote_code)
        try:
            model = load_model(source, trust_remote_code=trust_remote_code)
            logits = _logits(model, tokens)
        except Exception as error:  # a quantizer may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"{source}: its logits cannot be had for --verify, since transformers cannot run it here ({reason}); "
                "leave out --verify"
            ) from error
        activations = format_of(checkpoint.quantization).activations
        return Question(tokens=tokens, logits=logits, activations=activations, trust_remote_code=trust_remote_code)

    def compare(self, dense: Path) -> Agreement:
        """The dense model's answer beside it; raise ReloadMismatch where they differ by more than rounding."""
        model = load_model(dense, trust_remote_code=self.trust_remote_code)
        exact = _logits(model, self.tokens)
        with _rounding(model.to(torch.bfloat16), self.activations):
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


def _tokens(source: Path, text: str, *, trust_remote_code: bool) -> Tensor:
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    ids = tokenizer(text)["input_ids"][:MOST_TOKENS]
    if not ids:
        raise InputError(f"{source}: its tokenizer makes no token of the text; give another with --text")
    return torch.tensor([ids])


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens.to(model.device)).logits[0].float().cpu()
    return found


def _divergence(first: Tensor, second: Tensor) -> float:
    """Mean over tokens of KL(first || second), logits [T, V]."""
    p, q = torch.log_softmax(first.double(), -1), torch.log_softmax(second.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@contextmanager
def _rounding(model: Any, activations: str) -> Iterator[None]:
    """Have every linear layer round its inputs as the packed model's kernels do."""
    rounds: dict[str, Callable[[Tensor], Tensor]] = {"int8": _int8, "float8": _float8}
    if activations not in rounds:
        yield
        return

    def hook(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounds[activations](given[0]), *given[1:])

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    handles = [linear.register_forward_pre_hook(hook) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _int8(values: Tensor) -> Tensor:
    scale = values.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (torch.round(values.float() / scale) * scale).to(values.dtype)


def _float8(values: Tensor) -> Tensor:
    scale = values.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return ((values.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)
