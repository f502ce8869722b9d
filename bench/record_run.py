r"""Records a finished training run for the README's table of results.

    python -m bench.record_run RUN NAME --experiment TEXT --published TEXT \
        --command TEXT --steps 1 5 10

Reads what ``fastmaml train`` left in the folder RUN and writes
``bench/results/training/NAME.json``, which ``bench/results_table.py`` turns into a row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import ROOT, facts


def record(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the row needs: the evaluation, how long it took, where and when."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    known = facts.collect()
    first = evaluation["rows"][0] if "rows" in evaluation else _agent(evaluation)
    curve = [
        {k: row[k] for k in ("iteration", "returns", "interval") if k in row}
        for row in rows
        if row["kind"] == "validation" and "returns" in row
    ]
    return {
        "experiment": options.experiment,
        "command": options.command,
        "published": options.published,
        "measure": next(m for m in ("accuracy", "returns", "loss") if m in first),
        "steps": options.steps,
        "evaluation": first,
        **({"curve": curve} if curve else {}),
        "seconds": max(row.get("seconds", 0.0) for row in rows),
        "machine": f"{known['machine']['cpu']}, {known['machine']['cores']} cores",
        "commit": known["commit"],
        "date": known["date"][:10],
    }


def _agent(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An agent's evaluation, named as the rows of supervised ones are."""
    renamed = {"interval": "returns_interval"}
    row = {renamed.get(key, key): value for key, value in evaluation.items()}
    if "run" in row:
        row["run"] = Path(row["run"]).name  # where it lies is of no interest
    if "compared" in row:
        row["compared"] = [_agent(other) for other in row["compared"]]
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Writes one result file."""
    parser = argparse.ArgumentParser(prog="python -m bench.record_run")
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--published", required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    options = parser.parse_args(argv)
    out = ROOT / "bench" / "results" / "training" / f"{options.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record(options.run, options), indent=1) + "\n")


if __name__ == "__main__":
    main()
