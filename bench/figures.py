"""PNG figures of results: against the peers, as the work grows, and memory.

Points are medians, bars and bands reach from quartile to quartile, and lines carry
their names. Each file says inside which result it was drawn from (``bench.stamps``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from bench import stamps
from bench.targets import OURS, TARGETS, is_ours

DPI = 150
# told apart by lightness as well as by hue; fastmaml's stands out
COLORS = {
    OURS: "#c1121f",
    "autograd loop": "#6c757d",
    "vmap of grad": "#1d3557",
    "vmap, HVP chain": "#457b9d",
    "vmap + torch.compile": "#2a9d8f",
    "JAX jit vmap": "#e09f3e",
    "JAX, HVP chain": "#9e6b18",
}
AXES = {
    "tasks": "tasks T",
    "steps": "inner steps K",
    "samples": "support and query samples, each",
    "width": "width (units or channels)",
    "threads": "threads",
}

Points = list[tuple[float, float, float, float]]  # x, lower, median, upper


def _color(name: str) -> str:
    return COLORS.get(name, "#333333")


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _plain(value: float, _: int = 0) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _log_ticks(axes: Axes) -> None:
    """Marks a logarithmic y axis at 1, 10, 100, or also between where that is few."""
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [s * 10.0**e for e in range(-4, 8) for s in steps]
    axes.yaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_locator(FixedLocator([]))


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Moves positions apart by at least ``gap``, keeping their order and centre."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [positions[i] for i in order]
    for _ in range(50):
        for i in range(1, len(placed)):
            near = gap - (placed[i] - placed[i - 1])
            if near > 1e-9:
                placed[i - 1] -= near / 2
                placed[i] += near / 2
    moved = list(positions)
    for i, at in zip(order, placed, strict=True):
        moved[i] = at
    return moved


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Writes each line's name right of its last point, names apart from each other."""
    if not ends:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    at = [to_axes.transform(end) for end in ends.values()]
    heights = _spread([y for _, y in at], 0.075)
    for (name, end), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            name,
            end,
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=_color(name),
            fontweight="bold" if is_ours(name) else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": _color(name),
                "linewidth": 0.5,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def _line(axes: Axes, name: str, points: Points) -> None:
    x, lower, median, upper = zip(*points, strict=True)
    ours = is_ours(name)
    axes.fill_between(x, lower, upper, color=_color(name), alpha=0.18, linewidth=0)
    axes.plot(
        x,
        median,
        "o-",
        color=_color(name),
        linewidth=2.4 if ours else 1.4,
        markersize=4.5 if ours else 3.5,
        zorder=3 if ours else 2,
    )


def _save(figure: Figure, path: Path, result: Mapping[str, Any]) -> None:
    figure.savefig(path, dpi=DPI, metadata={stamps.KEY: stamps.stamp(result)})
    plt.close(figure)


# -- against the peers --------------------------------------------------------------


def _speed(result: Mapping[str, Any], path: Path) -> None:
    workloads = list(result["workloads"])
    figure, axes = plt.subplots(
        figsize=(8.5, 1.4 + 0.55 * len(workloads)), layout="constrained"
    )
    fields = [result["workloads"][w]["contenders"] for w in workloads]
    names = list(dict.fromkeys(n for field in fields for n in field if n != OURS))
    for i, name in enumerate(names):
        shift = 0.3 * (i / max(len(names) - 1, 1) - 0.5)
        rows = [
            (y + shift, field[name]["meta_gradient"]["ratio"])
            for y, field in enumerate(fields)
            if "ratio" in field.get(name, {}).get("meta_gradient", {})
        ]
        if not rows:
            continue
        y, ratios = zip(*rows, strict=True)
        median = [r["median"] for r in ratios]
        lower = [m - r.get("lower", m) for m, r in zip(median, ratios, strict=True)]
        upper = [r.get("upper", m) - m for m, r in zip(median, ratios, strict=True)]
        bars = [[max(0.0, v) for v in side] for side in (lower, upper)]
        axes.errorbar(
            median, y, xerr=bars, fmt="o", color=_color(name), markersize=5, label=name
        )
    aimed = [(TARGETS[w], y) for y, w in enumerate(workloads) if w in TARGETS]
    if aimed:
        x, y = zip(*aimed, strict=True)
        axes.plot(x, y, "|", color="black", markersize=22, markeredgewidth=1.5)
        axes.plot([], [], "|", color="black", markersize=10, label="target")
    axes.axvline(1, color=COLORS[OURS], linewidth=1.5)
    axes.text(
        1,
        -0.72,
        f"{OURS} = 1",
        color=COLORS[OURS],
        ha="center",
        fontsize=8,
        va="bottom",
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{_plain(v)}×"))
    axes.set_yticks(range(len(workloads)), workloads)
    axes.set_ylim(len(workloads) - 0.5, -0.5)
    axes.set_xlabel("time of a meta-gradient against fastmaml's (to the right: slower)")
    _style(axes)
    axes.grid(True, axis="x", color="0.9", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    _save(figure, path, result)


# -- as the work grows --------------------------------------------------------------


def _points(values: Sequence[int], measured: Mapping[str, Any]) -> Points:
    return [
        (value, point["lower"], point["median"], point["upper"])
        for value in values
        if "median" in (point := measured.get(str(value), {}))
    ]


def _name_absent(axes: Axes, names: Sequence[str]) -> None:
    """Says who has no point on these axes; the result has the reasons."""
    if names:
        text = f"left out: {', '.join(names)}"
        axes.set_title(text, fontsize=7, color="0.4", loc="left")


def _growth(series: Mapping[str, Any], path: Path, result: Mapping[str, Any]) -> None:
    axes_names = list(series["axes"])
    columns = min(3, len(axes_names))
    rows = -(-len(axes_names) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(4.1 * columns, 3.1 * rows),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    ends: list[tuple[Axes, dict[str, tuple[float, float]]]] = []
    for axes, name in zip(grid.flat, axes_names, strict=False):
        entry = series["axes"][name]
        last = {}
        for contender, measured in entry["contenders"].items():
            if points := _points(entry["values"], measured):
                _line(axes, contender, points)
                last[contender] = (points[-1][0], points[-1][2])
        _name_absent(axes, [n for n in entry["contenders"] if n not in last])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(entry["values"]))
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.set_xlabel(AXES.get(name, name))
        _style(axes)
        ends.append((axes, last))
    for axes in grid.flat[len(axes_names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("one meta-gradient, ms")
    base = ", ".join(f"{k} {v}" for k, v in series["base"].items())
    figure.suptitle(f"{series['title']} (elsewhere: {base})", fontsize=10)
    figure.canvas.draw()  # limits are known from here on
    for axes, last in ends:
        _log_ticks(axes)
        _label_ends(axes, last)
    _save(figure, path, result)


# -- memory -------------------------------------------------------------------------


def _memory(result: Mapping[str, Any], path: Path) -> None:
    memory = result["memory"]
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    ends = {}
    for name, entry in memory["contenders"].items():
        runs = entry["runs"]
        points: Points = [
            (k, mib, mib, mib)
            for k in memory["steps"]
            if "peak" in runs[str(k)]
            for mib in [runs[str(k)]["peak"] / 2**20]
        ]
        if points:
            _line(axes, name, points)
            ends[name] = (points[-1][0], points[-1][2])
    axes.set_yscale("log")
    _log_ticks(axes)
    axes.xaxis.set_major_locator(FixedLocator(memory["steps"]))
    axes.set_xlabel("inner steps K")
    axes.set_ylabel("peak memory of the process, MiB")
    axes.set_title(memory["workload"], fontsize=10)
    _style(axes)
    figure.canvas.draw()
    _label_ends(axes, ends)
    _save(figure, path, result)


def draw(results: Mapping[str, Mapping[str, Any] | None], folder: Path) -> list[Path]:
    """Writes every figure that the results make.

    Args:
        results: kind (``speed``, ``growth``) -> result or ``None``.
        folder: made if it isn't there.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in stamps.names(results):
        result, path = stamps.source_of(name, results), folder / name
        if name == "speed.png":
            _speed(result, path)
        elif name == "memory.png":
            _memory(result, path)
        else:
            workload = name.removeprefix("growth-").removesuffix(".png")
            _growth(result["series"][workload], path, result)
        made.append(path)
    return made
