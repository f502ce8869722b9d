"""Writes the README's table of training runs from bench/results/training/*.json.

One file per run, as in

    {"experiment": "sinusoid, 5-shot MSE after 1 / 5 / 10 steps",
     "command": "fastmaml train sinusoid --preset paper",
     "published": "0.67 / 0.38 / 0.35", "measure": "loss", "steps": [1, 5, 10],
     "evaluation": {"loss": [...], "loss_interval": [...], "tasks": 600, ...},
     "seconds": 57.1, "machine": "...", "commit": "...", "date": "..."}

where ``evaluation`` is what ``Evaluation.to_dict`` returned. ``--check`` writes
nothing and fails if the README differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
HEAD = (
    "| experiment | published | measured | evaluated on | training |",
    "| --- | --- | --- | --- | --- |",
)


def row(run: dict[str, Any]) -> str:
    """The table row of one run: what was measured, on what, from which command."""
    evaluation, measure = run["evaluation"], run["measure"]
    percent = measure == "accuracy"
    values, spread = evaluation[measure], evaluation[f"{measure}_interval"]
    form = "{:.1f} ± {:.1f}%" if percent else "{:.3f} ± {:.3f}"
    if measure == "returns":
        form = "{:.2f} ± {:.2f}"
    scale = 100 if percent else 1
    measured = " / ".join(
        form.format(scale * values[step], scale * spread[step]) for step in run["steps"]
    )
    if measure == "returns":
        on = f"{evaluation['tasks']} tasks, {evaluation['episodes']} episodes each"
    else:
        mode = "transductive" if evaluation["transductive"] else "inductive"
        on = f"{evaluation['tasks']} tasks, {evaluation['queries']} queries, {mode}"
    how = f"`{run['command']}`, {run['seconds']:.0f} s on {run['machine']}"
    source = f"{run['commit']}, {run['date']}"
    return (
        f"| {run['experiment']} | {run['published']} | {measured} | {on} "
        f"| {how} ({source}) |"
    )


def section(folder: Path) -> str:
    """What stands between the markers."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return "\n".join([*HEAD, *map(row, runs)]) if runs else "No runs recorded yet."


def main(arguments: list[str]) -> int:
    """Rewrites the section, or with ``--check`` says whether it is up to date."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    folder = ROOT / "bench" / "results" / "training"
    fresh = f"{head}{BEGIN}\n{section(folder)}\n{END}{tail}"
    if "--check" not in arguments:
        readme.write_text(fresh)
    elif fresh != text:
        sys.stderr.write("README.md is stale: run `python bench/results_table.py`\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
