"""Results of other machines than the one whose table the README shows in full.

What is fast on one processor need not be on another: each machine that has a full
result keeps one short table, with the date and commit it was measured at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import targets

COLUMNS = ("workload", "fastmaml, ms", "best peer", "its ms", "ratio", "target", "met")


def others(folder: Path, shown: Path) -> list[Path]:
    """Returns the newest full CPU result of each other processor, latest first.

    Args:
        folder: of the results.
        shown: the result whose table stands in full.
    """
    here = json.loads(shown.read_text())["machine"]["cpu"]
    newest: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        alike = (result["device"], result.get("kind", "speed")) == ("cpu", "speed")
        if not alike or result["quick"] or result["machine"]["cpu"] == here:
            continue
        cpu, dated = result["machine"]["cpu"], (result["date"], path)
        newest[cpu] = max(newest.get(cpu, dated), dated)
    return [path for _, path in sorted(newest.values(), reverse=True)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(result: Mapping[str, Any], source: str) -> str:
    """One machine's standings, and where they come from."""
    standings = [
        dict(zip(targets.HEAD, targets.cells(s), strict=True))
        for s in targets.of_result(result)
    ]
    rows = [[cells[c] for c in COLUMNS] for cells in standings]
    rule = ["---", "---:", "---", *["---:"] * (len(COLUMNS) - 3)]
    lines = [_row(COLUMNS), _row(rule), *map(_row, rows)]
    machine = result["machine"]
    said = (
        f"On {machine['cpu']}, {machine['threads']} threads ({result['date'][:10]}, "
        f"commit {result['commit']}; all contenders in [{source}]({source})):"
    )
    return "\n\n".join([said, "\n".join(lines)])
