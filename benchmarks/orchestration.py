"""What orchestration costs: one recipe through `requant run`, and the same steps called from a plain script.

Both start from an empty store. The difference is Prefect: its import, its temporary server, its requests. Shown are
seconds of the whole process, and what the difference would be of a ten-minute run. A server that runs already is not
covered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

TEN_MINUTES = 600.0
SCRIPT = """
import sys
from pathlib import Path
from pipeline.execute import run_step
from pipeline.plan import make_plan
from pipeline.recipe import load_recipe
plan = make_plan(load_recipe(Path(sys.argv[1]), sys.argv[2:]))
for step in plan.steps:
    run_step(plan, step)
"""


def main() -> None:
    """Print the table."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "eval.jsonl"
        text = (root / "pipeline" / "recipe.py").read_text(encoding="utf-8")
        rows.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(
            f"name: bench\nsource: {root}/examples/stdlib-lm-awq\n"
            f"quantize: [{{format: bitsandbytes}}, {{format: bitsandbytes, bits: 8}}]\nevaluate: {{data: {rows}}}\n"
        )
        commands = {
            "plain script": [sys.executable, "-c", SCRIPT, str(recipe)],
            "requant run": [sys.executable, "-m", "flows", "run", str(recipe)],
        }
        _timed(
            [*commands["requant run"], "--set", f"store={folder}/warm"], root
        )  # the first run makes Prefect's database
        seconds = {
            name: _timed([*command, *(["--set"] if name == "requant run" else []), f"store={folder}/{i}"], root)
            for i, (name, command) in enumerate(commands.items())
        }
    table = Table(title="upcast, two targets and evaluation of the example model")
    for heading in ("", "seconds", "of a ten-minute run"):
        table.add_column(heading, justify="right" if heading else "left")
    extra = seconds["requant run"] - seconds["plain script"]
    table.add_row("plain script", f"{seconds['plain script']:.1f}", "")
    table.add_row("requant run", f"{seconds['requant run']:.1f}", f"{extra / TEN_MINUTES:+.1%}")
    Console(width=110).print(table)


def _timed(command: list[str], root: Path) -> float:
    environment = {**os.environ, "PREFECT_API_URL": ""}
    started = time.perf_counter()
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
