"""PNG figures of a result: how much longer the peers take, and memory over steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def _speed(result: dict[str, Any], path: Path) -> None:
    workloads = list(result["workloads"])
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = dict.fromkeys(
        n for w in result["workloads"].values() for n in w["contenders"]
    )
    for name in names:
        points = [
            (index, row["meta_gradient"]["ratio"]["median"])
            for index, workload in enumerate(workloads)
            if (row := result["workloads"][workload]["contenders"].get(name))
            and "ratio" in row["meta_gradient"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=name)
    axes.set_yscale("log")
    axes.axhline(1, color="0.7", zorder=0)
    axes.set_xticks(range(len(workloads)), workloads, rotation=20, ha="right")
    axes.set_ylabel("time of a meta-gradient / fastmaml's")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _memory(result: dict[str, Any], path: Path) -> None:
    memory = result["memory"]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, entry in memory["contenders"].items():
        runs = entry["runs"]
        points = [(k, runs[str(k)]) for k in memory["steps"] if "peak" in runs[str(k)]]
        if points:
            steps, peaks = zip(*points, strict=True)
            axes.plot(steps, [p["peak"] / 2**20 for p in peaks], "o-", label=name)
    axes.set_xlabel("inner steps K")
    axes.set_ylabel("peak memory of the process, MiB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(result: dict[str, Any], folder: Path) -> None:
    """Writes ``speed.png`` and, where memory was measured, ``memory.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    _speed(result, folder / "speed.png")
    if "memory" in result:
        _memory(result, folder / "memory.png")
