"""Shares of the hardware's limits that the contenders of a result reach."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench import cost, roofline

Result = dict[str, Any]


def size(device: str) -> dict[str, Any]:
    """Of the matrices whose product is the ceiling: it must fill the device."""
    return {"device": device, "size": 2048 if device == "cpu" else 8192}


def of_memory_bound(
    workload: Result, ceilings: roofline.Ceilings, threads: int
) -> None:
    """States which memory bounds a workload if any does, and everyone's share of it."""
    fields = {f.name for f in dataclasses.fields(cost.Cost)}
    spent = cost.Cost(**{k: v for k, v in workload["cost"].items() if k in fields})
    bound = cost.memory_bound(spent, ceilings, threads)
    if not bound.binds:
        return
    workload["memory_bound"] = {"level": bound.level, "ms": 1e3 * bound.seconds}
    for row in workload["contenders"].values():
        share = 1e3 * bound.seconds / row["meta_gradient"]["median"]
        row["percent_of_memory_bound"] = 100 * share


def of_peak(result: Result) -> None:
    """States every meta-gradient's share of the best peak measured so far."""
    now = cost.matrix_peak(**size(result["device"]))
    best = max(now, result["peak"].get("matrix_flops", 0.0))
    result["peak"]["matrix_flops"] = best
    for workload in result["workloads"].values():
        for row in workload["contenders"].values():
            seconds = row["meta_gradient"]["median"] / 1e3
            flops = workload["cost"]["flops"]
            row["percent_of_peak"] = cost.percent_of_peak(flops, seconds, best)
