"""Makes the demo's rows from Python's own help texts: examples/data/train.jsonl and examples/data/eval.jsonl.

The help topics (`pydoc_data.topics`) ship with Python, so the demo downloads nothing. Sorted by name, every tenth is
for evaluation and the others are for training. What it does not cover: the topics differ a little between Python
releases, and with them the demo's figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

EVERY = 10  # 8 of Python 3.11's 79 topics are held out


def split() -> dict[str, list[str]]:
    """File name → texts, in the order of their topics' names."""
    names = sorted(topics)
    return {
        "train.jsonl": [topics[name] for i, name in enumerate(names) if i % EVERY],
        "eval.jsonl": [topics[name] for i, name in enumerate(names) if i % EVERY == 0],
    }


def write(path: Path, texts: list[str]) -> bool:
    """Write one `{"text": …}` a line, unless the file holds just that; say whether it was written."""
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.exists() and path.read_bytes() == content:
        return False
    path.write_bytes(content)
    return True


def main() -> None:
    """Write both files where they are missing or differ, and say what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    files = split()
    written = [name for name, texts in files.items() if write(folder / name, texts)]
    counts = ", ".join(f"{len(texts)} texts in {name}" for name, texts in files.items())
    print(f"{folder}: {counts} ({'written' if written else 'unchanged'})")


if __name__ == "__main__":
    main()
