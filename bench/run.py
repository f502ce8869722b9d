"""Runs the benchmark and writes one JSON file.

    python -m bench.run --out bench/results/NAME.json

One process times all contenders of a workload interleaved (see ``bench.timing``).
Before that, each contender runs alone in a fresh process: compilers that exceed
``--first-call-limit`` are found there and left out with the reason, and the time it
takes alone stands beside the interleaved one, so that a contender that suffers from
the others' thread pools shows. Results are written after every workload.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, contenders, cost, facts, memory, peers, roofline, shares, timing
from bench.contenders import OURS, Contender
from bench.timing import Plan
from bench.workloads import WORKLOADS, Workload
from fastmaml.tasks.batch import TaskBatch

BATCHES = 3  # distinct meta-batches that every contender cycles through
WRONG = 0.05  # relative error above which a contender is not computing the same thing
# beside the meta-steps
TRAINING, BARE, CAPTURED = "training step of ", "meta-gradient of ", "graph of "
TINY = {"tasks": 2, "support": 5, "query": 5}
QUICK = Plan(rounds=5, min_rounds=2, budget=1.0, min_sample=0.02)

Result = dict[str, Any]
Log = Callable[[str], None]


def milliseconds(summary: timing.Summary) -> Result:
    """Turns a summary in seconds into one in milliseconds, ready for JSON."""
    scaled = {k: 1e3 * v for k, v in dataclasses.asdict(summary).items()}
    return {**scaled, "samples": summary.samples}


# -- one contender alone, in a fresh process ----------------------------------------


def probe_here(
    workload: Workload, name: str, plan: Plan, device: str = "cpu"
) -> Result:
    """Times the first call of a contender and then the next ones, in this process."""
    contender = contenders.make(workload, name, device)
    inputs = [contender.prepare(workload.batch(seed)) for seed in range(BATCHES)]
    calls = timing.cycle(contender.meta_gradient, inputs, contender.finish)
    first = timing.time_call(calls, 1)
    alone = timing.solo(calls, plan)
    if device != "cpu":  # for the compilers' caches, see bench.gpu_stages
        contender.meta_step(inputs[0])
    return {"first_call_s": first, "alone_ms": 1e3 * statistics.median(alone)}


def probe(workload: Workload, name: str, limit: float, device: str = "cpu") -> Result:
    """Runs ``probe_here`` in a fresh process, for at most ``limit`` seconds.

    Returns:
        ``first_call_s`` and ``alone_ms``, or ``skipped`` with the reason.
    """
    command = [sys.executable, "-m", "bench.run", "--probe", workload.name, name]
    command += ["--device", device]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"no three calls within {limit:.0f} s, compiling included"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return {"skipped": facts.without_paths(lines[-1])}
    return json.loads(done.stdout.splitlines()[-1])


# -- one workload -------------------------------------------------------------------


@dataclasses.dataclass
class Field:
    """Who takes part in a workload.

    Attributes:
        calls: name -> quantity (``meta_gradient``, ``meta_step``, and for fastmaml
            ``training_step``) -> call.
        rows: name -> what is known beside the times.
        skipped: name -> reason.
    """

    calls: dict[str, dict[str, timing.Call]] = dataclasses.field(default_factory=dict)
    rows: dict[str, Result] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


def _error(
    contender: Contender, batches: Sequence[TaskBatch], wants: Sequence[peers.Params]
) -> float:
    """Median over batches of the relative error against float64.

    ReLU and max pooling make the gradient jump where rounding flips a branch, which
    can hit any program in float32; the median over batches keeps one from deciding.
    """
    errors = []
    for batch, want in zip(batches, wants, strict=True):
        _, got = contender.meta_gradient(contender.prepare(batch))
        errors.append(peers.error(contender.gradients(got), want))
    return statistics.median(errors)


def _references(
    workload: Workload, batches: Sequence[TaskBatch], device: str = "cpu"
) -> list[dict[str, Any]]:
    model = workload.model().to(device)
    problem = peers.make_problem(workload, model)
    params = dict(model.named_parameters())
    there = [batch.to(device=device) for batch in batches]
    return [peers.reference(problem, params, batch)[1] for batch in there]


def _enter(
    field: Field,
    workload: Workload,
    name: str,
    batches: Sequence[TaskBatch],
    wants: Sequence[peers.Params],
    device: str = "cpu",
) -> None:
    """Makes a contender, checks what it computes, and lets it in or says why not."""
    try:
        contender = contenders.make(workload, name, device)
        off = _error(contender, batches, wants)
        inputs = [contender.prepare(batch) for batch in batches]
        contender.meta_step(inputs[0])  # compile it, too
        capture = contender.captured_step
        captured = None if capture is None else capture(inputs[0])
    except Exception as problem:  # a peer may fail in any way; the run goes on
        first = (str(problem).strip().splitlines() or ["no message"])[0]
        reason = facts.without_paths(f"{type(problem).__name__}: {first}")
        field.skipped[name] = reason
        return
    if not off <= WRONG:
        field.skipped[name] = f"wrong: relative error {off:.1e} against float64"
        return
    field.rows.setdefault(name, {})["error"] = off
    steps = {"meta_gradient": contender.meta_gradient, "meta_step": contender.meta_step}
    if captured is not None:
        steps["captured_step"] = captured
    field.calls[name] = {
        quantity: timing.cycle(step, inputs, contender.finish)
        for quantity, step in steps.items()
    }
    if contender.training_step is not None:
        contender.training_step()
        field.calls[name]["training_step"] = contender.training_step


def _found_alone(workload: Workload, name: str, options: argparse.Namespace) -> Result:
    """What a contender alone has shown, now or before; empty: nobody asked."""
    compiles, before = contenders.compiles(name), options.probed
    if before is not None and before.exists():
        return json.loads(before.read_text()).get(workload.name, {}).get(name, {})
    if compiles or not (options.quick or before):
        return probe(workload, name, options.first_call_limit, options.device)
    return {}


def assemble(workload: Workload, options: argparse.Namespace, log: Log) -> Field:
    """Finds out who takes part in a workload; everyone has compiled afterwards."""
    field = Field(skipped=peers.unavailable())
    batches = [workload.batch(seed) for seed in range(BATCHES)]
    wants = _references(workload, batches, options.device)
    for name in contenders.names(options.engines, options.peers):
        if reason := contenders.reason_to_skip(
            workload, name, options.compile_all, options.device
        ):
            field.skipped[name] = reason
            continue
        found = _found_alone(workload, name, options)
        if "skipped" in found:
            field.skipped[name] = found["skipped"]
            continue
        field.rows[name] = found
        _enter(field, workload, name, batches, wants, options.device)
    for name, reason in field.skipped.items():
        field.rows.pop(name, None)
        log(f"  {name}: left out, {reason}")
    return field


def _training_calls(field: Field) -> dict[str, timing.Call]:
    """Whole training steps, and beside each the meta-gradient alone."""
    calls = {}
    for name, quantities in field.calls.items():
        if "training_step" in quantities:
            calls[TRAINING + name] = quantities["training_step"]
            calls[BARE + name] = quantities["meta_gradient"]
        if "captured_step" in quantities:
            calls[CAPTURED + name] = quantities["captured_step"]
    return calls


def _summary(
    samples: Mapping[int, float], against: Mapping[int, float] | None
) -> Result:
    row = milliseconds(timing.summarize(list(samples.values())))
    if against:
        row["ratio"] = dataclasses.asdict(timing.ratio(samples, against))
    return row


def overhead(step: Mapping[int, float], bare: Mapping[int, float]) -> Result:
    """What a training step takes beyond its meta-gradient, within rounds.

    Args:
        step: round -> seconds of sampling, meta-gradient and Adam.
        bare: round -> seconds of the meta-gradient alone.

    Returns:
        Summaries ``microseconds``, and ``percent`` of the meta-gradient.
    """
    both = sorted(step.keys() & bare.keys())
    extra = [1e6 * (step[r] - bare[r]) for r in both]
    percent = [100 * (step[r] / bare[r] - 1) for r in both]
    return {
        "microseconds": dataclasses.asdict(timing.summarize(extra)),
        "percent": dataclasses.asdict(timing.summarize(percent)),
    }


def run_workload(
    workload: Workload, options: argparse.Namespace, plan: Plan, log: Log
) -> Result:
    """Measures one workload; percentages of the peak are filled in by the caller."""
    field = assemble(workload, options, log)
    rows = field.rows
    first = next((n for n in field.calls if n.startswith(OURS)), None)
    for quantity in ("meta_gradient", "meta_step"):
        calls = {name: pair[quantity] for name, pair in field.calls.items()}
        if quantity == "meta_step":
            calls.update(_training_calls(field))
        times = timing.interleave(calls, plan)
        for name in field.calls:
            rows[name][quantity] = _summary(times[name], first and times[first])
        for name in field.calls:
            if TRAINING + name in times:
                step, bare = times[TRAINING + name], times[BARE + name]
                rows[name]["training_step"] = _summary(step, None)
                rows[name]["overhead"] = overhead(step, bare)
            if CAPTURED + name in times:
                rows[name]["captured_step"] = _summary(times[CAPTURED + name], None)
    for name, row in rows.items():
        log(f"  {name}: {row['meta_gradient']['median']:.3f} ms")
    spent = cost.cost(workload)
    return {
        "title": workload.title,
        "work": workload.work,
        "cost": {**dataclasses.asdict(spent), "bytes": spent.bytes},
        "contenders": rows,
        "skipped": field.skipped,
    }


# -- the whole run ------------------------------------------------------------------


def _save(result: Result, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)


def run(options: argparse.Namespace, log: Log) -> Result:
    """Runs what the options ask for, writing ``options.out`` as it goes.

    Raises:
        SystemExit: if a full run would hold torch to fewer threads than the others.
    """
    if "OMP_NUM_THREADS" in os.environ and not options.quick:
        raise SystemExit(
            "OMP_NUM_THREADS is set and holds back torch, but not JAX: unset it, "
            "or pass --quick"
        )
    plan = QUICK if options.quick else Plan(rounds=25, budget=options.budget)
    if options.rounds is not None:
        plan = dataclasses.replace(plan, rounds=options.rounds)
    command = shlex.join(["python", "-m", "bench.run", *options.argv])
    command = facts.without_paths(command)
    result = {
        "schema": 1,
        "quick": options.quick,
        "command": command,
        **facts.collect(options.device),
        "plan": dataclasses.asdict(plan),
        "peak": {"copy_bytes": cost.copy_bandwidth(device=options.device)},
        "workloads": {},
    }
    ceilings = None
    if options.device == "cpu" and contenders.native_missing() is None:
        ceilings = roofline.measure_ceilings()  # by the engine's own loops
        result["peak"]["core"] = dataclasses.asdict(ceilings)
    if not (options.no_memory or options.quick or options.device != "cpu"):
        log("memory")
        result["memory"] = memory.growth_rows()
        _save(result, options.out)
    for name in options.workloads:
        log(name)
        workload = WORKLOADS[name]
        if options.tiny:
            workload = workload.resized(**TINY)
        result["workloads"][name] = run_workload(workload, options, plan, log)
        shares.of_peak(result)
        if ceilings is not None:
            threads = result["machine"]["threads"]
            shares.of_memory_bound(result["workloads"][name], ceilings, threads)
        _save(result, options.out)
    return result


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench/results/latest.json"))
    add("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    add(
        "--engines",
        nargs="+",
        choices=("native", "functional", *contenders.BACKENDS),
        default=["native"],
        help="of fastmaml; ratios are against the first",
    )
    add("--peers", nargs="*", help="that take part (default all), by name")
    add("--rounds", type=int, help="most samples of a contender (default 25)")
    add("--budget", type=float, default=10.0, help="seconds per contender and quantity")
    add(
        "--quick",
        action="store_true",
        help="few samples, no memory rows; the report ignores it",
    )
    add("--no-memory", action="store_true", help="leave the memory rows out")
    add("--compile-all", action="store_true", help="torch.compile everything")
    add("--first-call-limit", type=float, default=120.0, help="seconds to compile")
    add("--probed", type=Path, help="what compilers have shown before, see gpu_stages")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where all compute")
    add("--tiny", action="store_true", help="few tasks and samples; needs --quick")
    add("--probe", nargs=2, metavar=("WORKLOAD", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.tiny and not options.quick:
        parser.error("--tiny changes the work: it needs --quick")
    options.argv = list(argv)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.device == "cuda":  # float32 is float32 for everyone
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    if options.probe:
        workload, name = options.probe
        print(json.dumps(probe_here(WORKLOADS[workload], name, Plan(), options.device)))
        return
    start = time.perf_counter()

    def log(text: str) -> None:
        spent = time.perf_counter() - start
        print(f"[{spent:6.0f} s] {text}", file=sys.stderr, flush=True)

    run(options, log)
    log(f"wrote {os.path.relpath(options.out)}")


if __name__ == "__main__":
    main()
