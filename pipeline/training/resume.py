"""Resume files: which of them are whole, and when the next are written.

Trainer writes a checkpoint file by file into its final place, so a kill leaves half of one. A marker with the digest of
each file, written last and renamed into its name, tells whole from half. The files are pickles in part (optimizer,
scheduler, random states); Trainer reads them with torch's `weights_only`, and only after the digests matched.

Several processes write one checkpoint together: the main one marks it, when all have written, and it alone looks for
the one to resume from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline import progress
from pipeline.digests import digest_file
from pipeline.training import processes

MARKER = "complete.json"
EVERY = 20.0  # seconds between saves on the clock: what a kill loses at most of a small model's training
SHARE = 20  # a save may cost a twentieth of the time since the last one


def last_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; the others are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True)
    whole = next((path for path in found if _is_whole(path)), None)
    for path in found:
        if path != whole:
            shutil.rmtree(path)
    return whole


def resume_point(arguments: TrainingArguments) -> str | None:
    """The folder of the newest whole checkpoint of this run, the same one in every process, or None."""
    folder = Path(str(arguments.output_dir))
    found = last_complete(folder) if processes.is_main() else None
    step = processes.from_main(_step_of(found) if found else -1)
    if step < 0:
        return None
    progress.message("train", f"resumes from checkpoint-{step}")
    return str(folder / f"checkpoint-{step}")


def mark_complete(checkpoint: Path) -> None:
    """Write the marker of a checkpoint whose files are all there."""
    digests = {path.relative_to(checkpoint).as_posix(): digest_file(path) for path in _files(checkpoint)}
    beside = checkpoint / f"{MARKER}.part"
    with beside.open("w", encoding="utf-8") as file:
        json.dump(digests, file, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(checkpoint / MARKER)


class Resumable(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Marks each checkpoint when it is whole; `on_clock`, asks for one every EVERY seconds, or SHARE times its cost.

    Several processes must agree on the step: they ask the main one's clock, at steps that it chooses so that asking
    costs nothing.
    """

    def __init__(self, *, on_clock: bool) -> None:
        self._on_clock = on_clock
        self._asked = self._saved = self._looked = time.monotonic()
        self._cost = 0.0
        self._step: int | None = None  # at which several processes last asked
        self._next = 0  # at which they ask again

    def on_train_begin(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self._saved = self._looked = time.monotonic()

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint when it is time."""
        if self._on_clock and self._due(state.global_step):
            control.should_save = True
        if control.should_save:
            self._asked = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Mark what was just written, by all processes."""
        processes.wait_for_all()
        if processes.is_main():
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        self._saved = time.monotonic()
        self._cost = self._saved - self._asked
        progress.message("train", f"can resume from step {state.global_step}")

    def _due(self, step: int) -> bool:
        now = time.monotonic()
        due = now - self._saved >= max(EVERY, SHARE * self._cost)
        if processes.count() == 1:
            return due
        if step < self._next:
            return False
        # One number says both: the steps until the next look, negative where a checkpoint is due.
        pace = (now - self._looked) / (1 if self._step is None else step - self._step)
        steps = max(1, int(EVERY / 4 / max(pace, 1e-3)))
        said = processes.from_main(-steps if due else steps)
        self._looked, self._step, self._next = now, step, step + abs(said)
        return said < 0


def _is_whole(checkpoint: Path) -> bool:
    try:
        digests = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return bool(digests) and all(digest_file(checkpoint / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith(MARKER))


def _step_of(checkpoint: Path) -> int:
    match = re.search(r"(\d+)$", checkpoint.name)
    return int(match[1]) if match else -1
