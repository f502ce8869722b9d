"""The README's table of meta-reinforcement learning, from a result of ``bench.rl``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

OURS, TENTH, PEER = "fastmaml", "fastmaml, a tenth", "torch.func"
FAST = "fastmaml, fast"


def rl_section(result: dict[str, Any], source: str) -> str:
    """Both tables and where their figures come from.

    Args:
        result: of ``bench.rl``.
        source: its path, as the README names it.
    """
    simulation = result["simulation"]
    fast = (
        "`fast`: as of `--preset fast`, three products of every twentieth "
        "sample, preconditioned, and a line search on a quarter of the tasks. "
        if FAST in result["iterations"]
        else ""
    )
    peer = (
        "The peer's iteration is its update beside fastmaml's sampling and processing. "
        if PEER in result["updates"]
        else ""
    )
    text = (
        f"{result['experiment']}: {result['tasks']} tasks × {result['episodes']} "
        f"episodes × {result['horizon']} steps, before and after one inner step; "
        "seconds, medians. `a tenth`: Fisher products of every tenth sample. "
        f"{fast}{peer}{result['machine']['cpu']}, {result['machine']['cores']} cores; "
        f"{result['date'][:10]}, commit {result['commit']}; all figures in "
        f"[{source}]({source}), written by `{result['command']}`."
    )
    parts = [_iterations(result), *([_speeds(result)] if simulation else []), text]
    return "\n\n".join(parts)


def _iterations(result: dict[str, Any]) -> str:
    rows, updates = [], result["updates"]
    for name, found in result["iterations"].items():
        rows.append(_row(name, found["sampling"], found["processing"], found["update"]))
    ours = result["iterations"][OURS]
    if PEER in updates:
        peer = _median(updates[PEER])
        rows.append(_row(PEER, ours["sampling"], ours["processing"], peer))
    head = "meta-iteration, s", "sampling", "processing", "meta-update", "all"
    return _table((*head, "update's share"), rows)


def _row(name: str, sampling: float, processing: float, update: float) -> list[str]:
    whole = sampling + processing + update
    seconds = (sampling, processing, update, whole)
    return [name, *(f"{s:.2f}" for s in seconds), f"{update / whole:.0%}"]


def _speeds(result: dict[str, Any]) -> str:
    sampled = result["iterations"][OURS]["sampled_steps_per_second"]
    speeds = {"fastmaml, policy included": sampled}
    for name, entry in result["simulation"].items():
        shown = "fastmaml, steps alone" if name == OURS else name
        speeds[shown] = entry["steps_per_second"]["median"]
    best = speeds["mujoco.batch"]
    cells = [[n, f"{v:,.0f}", f"{v / best:.0%}"] for n, v in speeds.items()]
    return _table(("simulation", "env-steps/s", "of mujoco.batch"), cells)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(r) + " |" for r in (head, rule, *rows))
