"""Writes the README's table of training runs from bench/results/training/*.json.

One file per run, as in

    {"experiment": "sinusoid, 5-shot MSE after 1 / 5 / 10 steps",
     "command": "fastmaml train sinusoid --preset paper",
     "published": "0.67 / 0.38 / 0.35", "measure": "loss", "steps": [1, 5, 10],
     "evaluation": {"loss": [...], "loss_interval": [...], "tasks": 600, ...},
     "seconds": 57.1, "machine": "...", "commit": "...", "date": "..."}

where ``evaluation`` is what ``Evaluation.to_dict`` returned. Below the table stands the
figure of agents, ``bench/results/figures/agents.png``, which ``--figures`` draws anew.
``--check`` writes nothing and fails if the README or the figure is not of these files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # where this file runs as a script
from bench import stamps  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
HEAD = (
    "| experiment | published | measured | evaluated on | training |",
    "| --- | --- | --- | --- | --- |",
)
TITLE = (
    "Returns of agents on held-out tasks against gradient steps (left; bands are 95% "
    "intervals over tasks), and on validation tasks as they train"
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


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs in a folder, name -> what its file says."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}


def agents(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of reinforcement learning."""
    return {name: run for name, run in runs.items() if run["measure"] == "returns"}


def section(runs: dict[str, dict[str, Any]], picture: str | None = None) -> str:
    """What stands between the markers.

    Args:
        runs: name -> what its file says.
        picture: the figure of agents, as seen from the README.
    """
    if not runs:
        return "No runs recorded yet."
    table = "\n".join([*HEAD, *map(row, runs.values())])
    return table if picture is None else f"{table}\n\n![{TITLE}]({picture})"


def stale(figure: Path, runs: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the figure of agents."""
    if not runs:
        return "drawn from no run there is" if figure.is_file() else None
    if not figure.is_file():
        return "missing"
    if stamps.read(figure) != stamps.stamp(runs):
        return "drawn from other runs"
    return None


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Rewrites the section and the figure, or with ``--check`` says what is stale.

    Args:
        arguments: ``--figures`` draws the figure too; ``--check`` changes nothing.
        root: of the checkout.
    """
    unknown = set(arguments) - {"--check", "--figures"}
    if unknown:
        sys.stderr.write(f"{' '.join(sorted(unknown))}: expected --check, --figures\n")
        return 2
    readme, check = root / "README.md", "--check" in arguments
    runs = recorded(root / "bench" / "results" / "training")
    figure = root / "bench" / "results" / "figures" / stamps.AGENTS
    if "--figures" in arguments and not check and agents(runs):
        from bench.agents import draw

        draw(agents(runs), figure)
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    picture = figure.relative_to(root).as_posix() if figure.is_file() else None
    fresh = f"{head}{BEGIN}\n{section(runs, picture)}\n{END}{tail}"
    if not check:
        readme.write_text(fresh)
        return 0
    wrong = [f"{readme.name}: stale"] if fresh != text else []
    found = stale(figure, agents(runs))
    wrong += [f"{figure.name}: {found}"] if found else []
    for line in wrong:
        sys.stderr.write(f"{line}, run `python bench/results_table.py --figures`\n")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
