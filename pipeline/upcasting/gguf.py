"""What a GGUF file becomes: its metadata a folder that transformers reads, its tensors those of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.checkpoint import Checkpoint
from pipeline.errors import InputError
from pipeline.gguf_names import pieces
from pipeline.gguf_rebuild import rebuild
from pipeline.gguf_shards import GGUFReader
from pipeline.pieces import Layout, Piece
from pipeline.skeleton import skeleton_of


@contextmanager
def laid_out(checkpoint: Checkpoint, *, dtype: torch.dtype) -> Iterator[Layout]:
    """The layout of a GGUF checkpoint, whose pieces can be read, and whose folder exists, inside the block."""
    with tempfile.TemporaryDirectory() as folder, GGUFReader(checkpoint) as reader:
        rebuild(checkpoint, Path(folder))
        # A layer's experts are one tensor here; an architecture may make as many modules of it.
        stored = sum(info.shape[0] if len(info.shape) > 2 else 1 for info in checkpoint.tensors.values())  # noqa: PLR2004 - experts stack to three dimensions
        skeleton = skeleton_of(Path(folder), dtype=dtype, trust_remote_code=False, stored=stored)
        made: list[Piece] = []
        dropped: Mapping[str, str] = {}
        problems: list[InputError] = []
        try:
            made, dropped = pieces(checkpoint, skeleton, reader.groups())
            problems += skeleton.problems(made)
        except InputError as error:
            problems.append(error)
        yield Layout(pieces=tuple(made), dropped=dropped, problems=tuple(problems), described=Path(folder))
