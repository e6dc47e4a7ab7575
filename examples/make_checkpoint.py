"""Makes the demo's source, examples/stdlib-lm-awq: a small Llama that has read Python's standard library, as 4-bit AWQ.

With `--model` it starts from a dense folder. Without, it trains the tokenizer (byte-level BPE) and the model from
nothing on the library's source, without its tests and help texts, every tenth file held out; the help texts are what
the demo trains on. What it does not cover: a good language model. It is there to be small and real.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.checkpoint import Checkpoint
from pipeline.encoding import calibration_samples, load_tokenizer
from pipeline.quantization import writers
from pipeline.quantization.folder import Order, Written
from pipeline.rows import Text
from pipeline.targets import AWQTarget

EVERY = 10
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "pydoc_data", "__pycache__"}
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The dense model: 6.8 million weights as it stands here, half of them in the embedding and the head."""

    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 768
    layers: int = 6


def sources() -> tuple[list[Text], list[Text]]:
    """The standard library's source files for training, and every tenth, held out; in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    texts = [Text(place=str(path.relative_to(root)), text=path.read_text("utf-8", errors="replace")) for path in paths]
    texts = [text for text in texts if text.text.strip()]
    return [text for i, text in enumerate(texts) if i % EVERY], texts[::EVERY]


def train_tokenizer(texts: Iterable[Text], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; pad, bos and eos are 0, 1 and 2, and nothing is added to a text by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text.text for text in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def encode(texts: Iterable[Text], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts as one row of token ids, each followed by the end-of-sequence token."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text.text), 2]
    return torch.tensor(ids)


def train_model(tokens: torch.Tensor, shape: Shape, *, steps: int, batch: int, length: int) -> LlamaForCausalLM:
    """A Llama trained in float32 with AdamW on random windows, its rate rising for a twentieth, then a cosine."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * i / steps))
    )
    for step in range(steps):
        starts = torch.randint(len(tokens) - length, (batch,))
        ids = torch.stack([tokens[start : start + length] for start in starts])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor, *, length: int) -> float:
    """The exponential of the mean loss over at most 64 windows of `length` tokens that do not overlap."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)[:64]
    losses = [model(input_ids=window[None], labels=window[None]).loss for window in windows]
    return float(torch.stack(losses).mean().exp())


def quantize(dense: Path, out: Path, texts: list[Text], *, group_size: int, samples: int, length: int) -> Written:
    """Write `out` as AWQ, calibrated on `texts`, with Requant's own writer."""
    target = AWQTarget(format="awq", group_size=group_size)
    writers.check(Checkpoint.open(dense), [target])
    tokenizer = load_tokenizer(dense, trust_remote_code=False)
    ids = calibration_samples(texts, tokenizer, samples=samples, length=length, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "out"
        order = Order(
            dense=dense.resolve(), out=made, scratch=Path(scratch) / "scratch", target=target,
            calibration=tuple(tuple(row) for row in ids.tolist()),
        )  # fmt: skip
        (((_, written),),) = writers.write([order])
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    return written


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a dense folder to start from; trained from nothing if left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "stdlib-lm-awq")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--length", type=int, default=256, help="tokens in a calibration sample or a training window")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--files", type=int, help="read only so many of the source files")
    parser.add_argument("--vocabulary", type=int, default=Shape().vocabulary)
    parser.add_argument("--hidden", type=int, default=Shape().hidden)
    parser.add_argument("--intermediate", type=int, default=Shape().intermediate)
    parser.add_argument("--layers", type=int, default=Shape().layers)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train unless a model is given, quantize, and say what came out."""
    options = arguments()
    torch.manual_seed(options.seed)
    training, held_out = sources()
    training, held_out = training[: options.files], held_out[: options.files]
    with tempfile.TemporaryDirectory() as scratch:
        dense = options.model or Path(scratch) / "dense"
        if options.model is None:
            shape = Shape(
                vocabulary=options.vocabulary, hidden=options.hidden, intermediate=options.intermediate,
                layers=options.layers,
            )  # fmt: skip
            tokenizer = train_tokenizer(training, vocabulary=shape.vocabulary)
            tokens = encode(training, tokenizer)
            print(f"{len(training)} files, {len(tokens)} tokens; {len(held_out)} files held out")
            model = train_model(tokens, shape, steps=options.steps, batch=options.batch, length=options.length)
            figure = perplexity(model, encode(held_out, tokenizer), length=options.length)
            print(f"perplexity on the files held out, in windows of {options.length}: {figure:.2f}")
            model.to(torch.bfloat16).save_pretrained(dense)
            tokenizer.save_pretrained(dense)
        written = quantize(
            dense, options.out, training,
            group_size=options.group_size, samples=options.samples, length=options.length,
        )  # fmt: skip
    print(f"{options.out}: {len(written.packed)} modules in AWQ, {written.bits_per_weight:.2f} bits a weight over all")


if __name__ == "__main__":
    main()
