"""A projector trained through Trainer and on cached features, to see what running a frozen backbone once is worth.

A random Llama of four million parameters, 512 rows of 64 tokens whose class is their last token's, batches of 32. Each
role runs in a process of its own, the fastest of several: Trainer with the backbone at every step, and the features
computed and a projector trained on them, each for 10 epochs and the latter for 50 too; then 10 epochs on features that
an earlier run left. Shown are seconds from the loaded model to the trained projector, the accuracy on rows that it
never saw, and the bytes of the features. It does not cover a GPU, or a backbone that is quantized.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pipeline.child import WAITING
from pipeline.labelled import padded_ids
from pipeline.pairing import Description
from pipeline.training.arguments import training_arguments
from pipeline.training.feature_loop import fit
from pipeline.training.feature_rows import LabelledRows
from pipeline.training.features import Features, features, pooled
from pipeline.training.projector import FeatureProjector, ProjectedModel, ProjectorLayer

HIDDEN, TOKENS, ROWS, UNSEEN, CLASSES = 256, 64, 512, 512, 4
CONFIG = LlamaConfig(
    vocab_size=1024, hidden_size=HIDDEN, intermediate_size=688, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
PROJECTOR = Description(
    kind="linear", pooling="last_token", in_features=HIDDEN, hidden_features=None, out_features=CLASSES,
    task="classification", classes=tuple("abcd"),
)  # fmt: skip
Result = dict[str, float]
Row = tuple[list[int], int]


def main() -> None:
    """Print the table; `--role` is how it calls itself for one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        print(json.dumps(_measured(given.role, given.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG)
        model.save_pretrained(Path(folder) / "model")
        parameters = sum(weight.numel() for weight in model.parameters())
        results = {role: _fastest(role, Path(folder), given.rounds) for role in ROLES}
    table = Table(title=f"{parameters / 1e6:.1f} M parameters, {ROWS} rows of {TOKENS} tokens, {os.cpu_count()} cores")
    for heading in ("", "seconds", "of Trainer", "ms a step", "accuracy", "features on disk"):
        table.add_column(heading, justify="right" if heading else "left")
    for role, result in results.items():
        table.add_row(
            role, f"{result['seconds']:.2f}", f"{result['seconds'] / results[TRAINER]['seconds']:.3f}",
            f"{result['step'] * 1e3:.2f}", f"{result['accuracy']:.3f}", f"{result['bytes'] / 1e6:.2f} MB",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    faster = results[TRAINER]["seconds"] / results[TEN]["seconds"]
    console.print(f"Trainer takes {faster:.1f} times as long; fifty epochs cost "
                  f"{results[FIFTY]['seconds'] / results[TEN]['seconds']:.2f} times ten.")  # fmt: skip


def _fastest(role: str, folder: Path, rounds: int) -> Result:
    """The fastest of several processes: what else the machine does only ever adds."""
    print(f"{role} …", file=sys.stderr)
    found = [_run(role, folder) for _ in range(rounds)]
    return min(found, key=lambda result: result["seconds"])


def _run(role: str, folder: Path) -> Result:
    command = [sys.executable, __file__, "--role", role, "--folder", str(folder)]
    settings = {**WAITING, **os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{role}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _rows(count: int, *, seed: int) -> list[Row]:
    """(token ids, class): all of one length, so that neither role pads more than the other."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 1024, (count, TOKENS), generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    ids[:, -1] = 10 + labels
    return list(zip(ids.tolist(), labels.tolist(), strict=True))


def _measured(role: str, folder: Path) -> Result:
    run, epochs = ROLES[role]
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    given = {"num_train_epochs": epochs, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "use_cpu": True}
    arguments = training_arguments(given, folder=work / "checkpoints", seed=0, mixed=False)
    rows, store = _rows(ROWS, seed=0), folder / "kept" if role == AGAIN else work / "features"
    if role == AGAIN:
        _cached(model, rows, store)
    started = time.perf_counter()
    layer, looped = run(model, rows, arguments, store)
    seconds = time.perf_counter() - started
    used = sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) if store.exists() else 0
    steps = epochs * ROWS // 32
    return {"seconds": seconds, "step": looped / steps, "accuracy": _accuracy(model, layer, work), "bytes": used}


def _accuracy(model: LlamaForCausalLM, layer: ProjectorLayer, work: Path) -> float:
    unseen = _rows(UNSEEN, seed=1)
    found = _cached(model, unseen, work / "unseen").pooled(torch.arange(UNSEEN))
    with torch.no_grad():
        right = layer(found).argmax(1) == torch.tensor([label for _, label in unseen])
    return float(right.float().mean())


def _cached(model: LlamaForCausalLM, rows: list[Row], folder: Path) -> Features:
    return features(
        lambda: model, [ids for ids, _ in rows], folder=folder, backbone="benchmark", dtype="float32",
        kept=pooled("last_token"), width=HIDDEN, sequence_length=TOKENS, pad_token=0,
    )  # fmt: skip


def _trainer(
    model: LlamaForCausalLM, rows: list[Row], arguments: TrainingArguments, _: Path
) -> tuple[ProjectorLayer, float]:
    def collated(batch: list[Row]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([label for _, label in batch])
        return {**padded_ids([ids for ids, _ in batch], pad_token=0), "labels": labels}

    projected = ProjectedModel(model, PROJECTOR)
    trainer = Trainer(model=projected, args=arguments, train_dataset=rows, data_collator=collated)
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    return projected.projector.layer, time.perf_counter() - started


def _on_features(
    model: LlamaForCausalLM, rows: list[Row], arguments: TrainingArguments, folder: Path
) -> tuple[ProjectorLayer, float]:
    found = _cached(model, rows, folder)
    module = FeatureProjector(ProjectorLayer(PROJECTOR), "classification")
    started = time.perf_counter()
    fit(module, LabelledRows(features=found, labels=torch.tensor([label for _, label in rows])), arguments)
    return module.layer, time.perf_counter() - started


TRAINER, TEN, FIFTY, AGAIN = "Trainer, 10 epochs", "features, 10 epochs", "features, 50 epochs", "kept features, 10"
Work = Callable[[LlamaForCausalLM, list[Row], TrainingArguments, Path], tuple[ProjectorLayer, float]]
ROLES: dict[str, tuple[Work, int]] = {
    TRAINER: (_trainer, 10), TEN: (_on_features, 10), FIFTY: (_on_features, 50), AGAIN: (_on_features, 10),
}  # fmt: skip


if __name__ == "__main__":
    main()
