"""The recipe that `requant init` writes."""

from __future__ import annotations

import re

from pipeline.catalog import format_of
from pipeline.checkpoint import Checkpoint
from pipeline.sizes import dense_sizes

TEMPLATE = """\
# {title}
# Check it with `requant plan {name}.yaml`, run it with `requant run {name}.yaml`.
schema: 1
name: {name}                    # the model's name in the store
source: {source}                # folder, hub id[@revision], or store reference name/variant@version
upcast: {{dtype: bfloat16}}       # what the source is dequantized to
train:
  method: lora                  # none, lora, full, head, projector or qat
  base: dense                   # dense, source (as it is), nf4 or int8 (QLoRA)
  data: {{path: {data}}}          # file, folder, glob, hub dataset or URL
  sequence_length: {length}
  lora: {{r: 16, lora_alpha: 32, target_modules: all-linear}}     # PEFT's LoraConfig names
  # transformers' TrainingArguments names:
  arguments: {{learning_rate: 2.0e-4, num_train_epochs: 1, per_device_train_batch_size: 8}}
quantize:                       # each becomes a variant with a version of its own
  - {{format: bitsandbytes, type: nf4}}
{groups}calibration: {{data: train, samples: 128, sequence_length: {length}}}
evaluate:
  data: {evaluation}
  gates: {{perplexity_increase: 0.03, kl_divergence: 0.05}}       # of each variant against its dense parent
promote: {{alias: production}}    # what a variant that keeps its bounds gets
store: artifacts
"""


def recipe_text(model: str, checkpoint: Checkpoint, *, data: str, evaluation: str) -> tuple[str, str]:
    """The text of a recipe that fits the checkpoint, and the name it goes by."""
    row = format_of(checkpoint.quantization)
    sizes = dense_sizes(checkpoint, row)
    stem = model.partition("@")[0].rstrip("/").rsplit("/", 1)[-1].lower().removesuffix(".gguf")
    name = re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._") or "model"
    fitting = [size for size in (128, 64, 32, 16) if all(columns % size == 0 for _, columns in sizes.linears.values())]
    group_lines = [
        f"  - {{format: {kind}, bits: 4, group_size: {fitting[0]}}}\n" for kind in ("gptq", "awq") if fitting
    ]
    longest = int(checkpoint.config.get("max_position_embeddings") or 512)
    text = TEMPLATE.format(
        title=f"{model}: {checkpoint.model_type or 'unknown'}, {row.title}, {sizes.parameters / 1e6:.1f} M parameters.",
        name=name,
        source=model,
        data=data,
        evaluation=evaluation,
        length=min(512, longest),
        groups="".join(group_lines),
    )
    return text, name
