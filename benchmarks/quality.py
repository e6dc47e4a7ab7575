"""How well a quantized language model answers: each token's loss, and its divergence from the dense model.

Weights are read back by Requant's own upcast and computed in float32, so that no kernel's rounding is a part of the
figures; that transformers reads the same weights is for the tests to show.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.checkpoint import Checkpoint
from pipeline.jobs import Job
from pipeline.stages import upcast

BATCH = 8  # windows
RESAMPLES = 10_000  # of the bootstrap


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Of every predicted token of W windows of L tokens: float32 [W, L - 1] each.

    `losses` are negative log-likelihoods and `divergences` KL(dense || quantized), both in nats; `agreeing` is 1 where
    both think the same token the likeliest.
    """

    losses: Tensor
    divergences: Tensor
    agreeing: Tensor

    def save(self, path: Path) -> None:
        """Write all three to a safetensors file."""
        save_file(asdict(self), path)

    @staticmethod
    def load(path: Path) -> Judged:
        """What `save` wrote."""
        return Judged(**load_file(path))


def answers(model: Any, windows: Tensor) -> Iterator[Tensor]:
    """The log-probabilities of windows [W, L] of token ids, a few at a time: float32 [w, L - 1, V]."""
    for ids in windows.split(BATCH):
        with torch.inference_mode():  # never around a yield: it would hold for the caller
            scores = torch.log_softmax(model(ids).logits[:, :-1], -1)
        yield scores


def judge(dense: Iterable[Tensor], model: Any, windows: Tensor) -> Judged:
    """What a model answers beside the dense one's answers, on windows [W, L] of token ids."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for ids, wanted, scores in zip(windows.split(BATCH), dense, answers(model, windows), strict=True):
        losses = -scores.gather(2, ids[:, 1:, None]).squeeze(2)
        divergences = (wanted.exp() * (wanted - scores)).sum(2)
        found.append((losses, divergences, (wanted.argmax(2) == scores.argmax(2)).float()))
    losses, divergences, agreeing = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Judged(losses=losses, divergences=divergences, agreeing=agreeing)


def loaded(folder: Path) -> Any:
    """The model of a dense or quantized folder, its weights dequantized to float32."""
    with tempfile.TemporaryDirectory() as work:
        if Checkpoint.open(folder).quantization is not None:
            job = Job(inputs={"source": folder}, options={"dtype": "float32"}, workspace=Path(work))
            (output,) = upcast.run(job)
            folder = output.folder
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def interval(ours: Sequence[Judged], theirs: Sequence[Judged]) -> tuple[float, float, float]:
    """The mean difference of token losses (ours less theirs) and its 95 % bootstrap interval.

    The windows are drawn anew, each with all its tokens, since tokens of one window are not independent. Given several
    calibration draws, a window's difference is the mean over them, so that the interval is of the draws that were made.
    """
    pairs = zip(ours, theirs, strict=True)
    windows = torch.stack([(our.losses.double() - their.losses.double()).mean(1) for our, their in pairs]).mean(0)
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(windows), (RESAMPLES, len(windows)), generator=random)
    low, high = windows[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(windows.mean()), low, high
