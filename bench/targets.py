"""How much faster than the best peer fastmaml is meant to be, and whether it is.

The same rows come out of ``pytest bench`` (medians of that run) and, from a committed
result, out of ``bench/report.py``. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

OURS = "fastmaml"
NONE = "–"

# time of the best peer's meta-gradient / fastmaml's, on CPUs
TARGETS: dict[str, float] = {
    "sinusoid-1": 6.0,
    "sinusoid-5": 5.0,
    "omniglot-conv-1": 4.5,
    "omniglot-conv-5": 5.5,
    "omniglot-fc": 5.0,
    "mini-imagenet": 6.0,
    "policy": 2.8,
}


PEAK, BANDWIDTH = "peak", "memory bound"

# percent of what bounds fastmaml's meta-gradient there
SHARES: dict[str, tuple[float, str]] = {
    "sinusoid-1": (60.0, PEAK),
    "sinusoid-5": (60.0, PEAK),
    "omniglot-conv-1": (75.0, PEAK),
    "omniglot-conv-5": (75.0, PEAK),
    "omniglot-fc": (70.0, BANDWIDTH),
    "mini-imagenet": (75.0, PEAK),
    "policy": (80.0, PEAK),
}


@dataclass(frozen=True)
class Standing:
    """Where fastmaml stands on one workload.

    Attributes:
        workload: its short name.
        ours_ms: milliseconds of fastmaml's meta-gradient.
        peer: the fastest other contender, ``None`` without any.
        peer_ms: its milliseconds.
        ratio: of the two, from rounds that timed both where there are such.
        percent_of_peak: fastmaml's share of the best matrix product.
        training_ms: sampling, meta-gradient and Adam, ``None`` if not measured.
        overhead_us: what of that is beyond the meta-gradient, microseconds.
        overhead_percent: the same in percent of the meta-gradient.
        percent_of_memory: share of the time that memory allows, ``None`` where
            arithmetic takes longer than that, or without a measurement.
        memory: which cache, or ``memory``, delivers the parameters there.
    """

    workload: str
    ours_ms: float
    peer: str | None
    peer_ms: float | None
    ratio: float | None
    percent_of_peak: float
    training_ms: float | None = None
    overhead_us: float | None = None
    overhead_percent: float | None = None
    percent_of_memory: float | None = None
    memory: str | None = None

    @property
    def target(self) -> float | None:
        """The ratio aimed at, ``None`` where there is none."""
        return TARGETS.get(self.workload)

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the target, ``None`` where that can't be said."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio >= self.target

    @property
    def reached(self) -> bool | None:
        """Whether the share aimed at is reached, ``None`` where that can't be said."""
        if self.workload not in SHARES:
            return None
        aim, of = SHARES[self.workload]
        share = self.percent_of_peak if of == PEAK else self.percent_of_memory
        return None if share is None or share != share else share >= aim


def is_ours(name: str) -> bool:
    """Whether a contender is fastmaml, on whichever engine."""
    return name.startswith(OURS)


def _of_workload(name: str, workload: Mapping[str, Any]) -> Standing | None:
    field = workload["contenders"]
    mine = field.get(OURS)
    if mine is None:
        return None
    peers = {
        n: row["meta_gradient"]
        for n, row in field.items()
        if not is_ours(n) and "ratio" in row["meta_gradient"]
    }
    best = min(peers, key=lambda n: peers[n]["ratio"]["median"], default=None)
    overhead = mine.get("overhead", {})
    return Standing(
        workload=name,
        ours_ms=mine["meta_gradient"]["median"],
        peer=best,
        peer_ms=peers[best]["median"] if best else None,
        ratio=peers[best]["ratio"]["median"] if best else None,
        percent_of_peak=mine["percent_of_peak"],
        training_ms=mine.get("training_step", {}).get("median"),
        overhead_us=overhead.get("microseconds", {}).get("median"),
        overhead_percent=overhead.get("percent", {}).get("median"),
        percent_of_memory=mine.get("percent_of_memory_bound"),
        memory=workload.get("memory_bound", {}).get("level"),
    )


def of_result(result: Mapping[str, Any]) -> list[Standing]:
    """Standings in a result of ``bench.run``; workloads without us are left out."""
    found = (
        _of_workload(name, workload) for name, workload in result["workloads"].items()
    )
    return [standing for standing in found if standing is not None]


def of_medians(
    medians: Mapping[str, Mapping[str, Mapping[str, float]]],
    percents: Mapping[str, float],
) -> list[Standing]:
    """Standings of contenders timed one after the other.

    Args:
        medians: workload -> quantity (``meta_gradient``, ``training_step``) -> name ->
            seconds.
        percents: workload -> fastmaml's percent of the peak.
    """
    standings = []
    for workload, quantities in medians.items():
        times = quantities.get("meta_gradient", {})
        if OURS not in times:
            continue
        ours = times[OURS]
        peers = {n: t for n, t in times.items() if not is_ours(n)}
        best = min(peers, key=lambda n: peers[n], default=None)
        step = quantities.get("training_step", {}).get(OURS)
        standings.append(
            Standing(
                workload=workload,
                ours_ms=1e3 * ours,
                peer=best,
                peer_ms=1e3 * peers[best] if best else None,
                ratio=peers[best] / ours if best else None,
                percent_of_peak=percents.get(workload, float("nan")),
                training_ms=None if step is None else 1e3 * step,
                overhead_us=None if step is None else 1e6 * (step - ours),
                overhead_percent=None if step is None else 100 * (step / ours - 1),
            )
        )
    return standings


HEAD = (
    "workload",
    "fastmaml, ms",
    "best peer",
    "its ms",
    "ratio",
    "target",
    "met",
    "% of peak",
    "% of memory bound",
    "share aimed at",
    "reached",
    "training step, ms",
    "beyond the meta-gradient",
)


def digits(value: float | None, significant: int = 3) -> str:
    """Formats a number with three significant digits, all of those before the point."""
    if value is None or value != value:
        return NONE
    exponent = int(f"{value:.{significant - 1}e}".split("e")[1])
    places = max(significant - 1 - exponent, 0) if value else 0
    return f"{value:,.{places}f}"


def cells(standing: Standing) -> list[str]:
    """One row of the table, in the order of ``HEAD``."""
    said = {True: "yes", False: "no", None: NONE}
    memory, aim = NONE, NONE
    if standing.percent_of_memory is not None:
        memory = f"{digits(standing.percent_of_memory, 2)} ({standing.memory})"
    if standing.workload in SHARES:
        percent, of = SHARES[standing.workload]
        aim = f"{percent:g}% of {of}"
    beyond = NONE
    if standing.overhead_us is not None:
        beyond = f"{standing.overhead_us:,.0f} µs, {standing.overhead_percent:.0f}%"
    return [
        standing.workload,
        digits(standing.ours_ms),
        standing.peer or NONE,
        digits(standing.peer_ms),
        NONE if standing.ratio is None else f"{digits(standing.ratio)}×",
        NONE if standing.target is None else f"{standing.target:g}×",
        said[standing.met],
        digits(standing.percent_of_peak, 2),
        memory,
        aim,
        said[standing.reached],
        digits(standing.training_ms),
        beyond,
    ]


def text_table(standings: Iterable[Standing]) -> str:
    """The rows in columns of spaces, for a terminal."""
    rows = [list(HEAD), *map(cells, standings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    left = {0, 2}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
