"""How the time of a meta-gradient grows with the work, and memory with the steps.

    python -m bench.growth --out bench/results/NAME-growth.json [--quick] [--resume]

From one workload as the base, one size at a time is changed: tasks, inner steps,
samples, width, threads. At every point fastmaml and the peers that do best on that
workload are timed interleaved, as in ``bench.run``. Whoever compiles is first tried in
a fresh process under ``--first-call-limit``; who exceeds it, or fails, is left out of
that point with the reason. The file is written after every point, and ``--resume``
goes on where one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, contenders, facts, memory, timing
from bench.contenders import OURS
from bench.run import BATCHES, QUICK, milliseconds
from bench.workloads import WAYS, WORKLOADS, Workload
from fastmaml import get_num_threads, models, set_num_threads

AXES = ("tasks", "steps", "samples", "width", "threads")
VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "sinusoid-1": {
        "tasks": (1, 4, 16, 64),
        "steps": (1, 2, 5, 10, 20),
        "samples": (5, 10, 20, 50, 100),
        "width": (20, 40, 80, 160),
    },
    "omniglot-conv-1": {
        "tasks": (1, 4, 16, 64),
        "steps": (1, 2, 5, 10, 20),
        "samples": (5, 10, 25, 50),
        "width": (16, 32, 64, 128),
    },
}
WIDE: dict[str, Callable[[int], torch.nn.Module]] = {
    "sinusoid-1": lambda width: models.sinusoid_mlp(hidden=(width, width)),
    "omniglot-conv-1": lambda width: models.omniglot_conv(WAYS, channels=width),
}
BASE_WIDTH = {"sinusoid-1": 40, "omniglot-conv-1": 64}
PEERS = {
    "sinusoid-1": ("vmap + torch.compile", "JAX jit vmap"),
    "omniglot-conv-1": ("vmap of grad", "vmap, HVP chain", "autograd loop"),
}
STEPS_OF_MEMORY = (1, 2, 5, 10, 20)
ONE_POOL = "XLA's threads are as many as there are CPUs; no call changes that"

Result = dict[str, Any]


def values(name: str, axis: str) -> tuple[int, ...]:
    """The sizes of one axis; threads go up to those available."""
    if axis != "threads":
        return VALUES[name][axis]
    most = torch.get_num_threads()
    return tuple(sorted({*(n for n in (1, 2, 4, 8, 16, 32, 64) if n < most), most}))


def scaled(workload: Workload, axis: str, value: int) -> Workload:
    """The workload with one size changed; threads are no size of it."""
    if axis == "samples":
        return workload.resized(support=value, query=value)
    if axis == "width":
        build = WIDE[workload.name]
        return dataclasses.replace(workload, build=lambda: build(value))
    return workload if axis == "threads" else workload.resized(**{axis: value})


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Holds torch, what it compiles, and fastmaml to a number of threads."""
    import torch._inductor.config as inductor

    native = contenders.native_missing() is None
    before = torch.get_num_threads(), inductor.cpp.threads
    ours = get_num_threads() if native else None
    torch.set_num_threads(count)
    inductor.cpp.threads = count  # compiled code has the number written into it
    if native:
        set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        inductor.cpp.threads = before[1]
        if native:
            set_num_threads(ours)


# -- one point ----------------------------------------------------------------------


def try_here(name: str, axis: str, value: int, contender: str) -> None:
    """Calls a contender once at one point, in this process."""
    work = scaled(WORKLOADS[name], axis, value)
    with threads(value if axis == "threads" else torch.get_num_threads()):
        made = contenders.make(work, contender)
        made.meta_gradient(made.prepare(work.batch()))


def attempt(
    name: str, axis: str, value: int, contender: str, limit: float
) -> str | None:
    """Runs ``try_here`` in a fresh process.

    Returns:
        Why the contender can't take part, or ``None`` if it can.
    """
    command = [sys.executable, "-m", "bench.growth"]
    command += ["--try", name, axis, str(value), contender]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"no first call within {limit:.0f} s, compiling included"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
    return facts.without_paths(lines[-1])


def reason_against(
    name: str, axis: str, value: int, contender: str, options: argparse.Namespace
) -> str | None:
    """Why a contender sits one point out, or ``None``."""
    work = scaled(WORKLOADS[name], axis, value)
    if reason := contenders.reason_to_skip(work, contender, compile_all=True):
        return reason
    if contender.startswith("JAX") and axis == "threads":
        return ONE_POOL
    if contender == OURS:
        return contenders.native_missing()
    if contenders.compiles(contender):
        return attempt(name, axis, value, contender, options.first_call_limit)
    return None


def _calls(
    work: Workload, names: Sequence[str], found: Result
) -> dict[str, timing.Call]:
    """Makes and calls the contenders once; who fails is noted in ``found``."""
    calls = {}
    for name in names:
        try:
            made = contenders.make(work, name)
            inputs = [made.prepare(work.batch(seed)) for seed in range(BATCHES)]
            made.meta_gradient(inputs[0])
        except Exception as problem:  # a peer may fail in any way; the run goes on
            first = (str(problem).strip().splitlines() or ["no message"])[0]
            text = facts.without_paths(f"{type(problem).__name__}: {first}")
            found[name] = {"skipped": text}
            continue
        calls[name] = timing.cycle(made.meta_gradient, inputs)
    return calls


def point(name: str, axis: str, value: int, options: argparse.Namespace) -> Result:
    """Times all contenders at one point.

    Returns:
        name -> median and quartiles in milliseconds, or ``skipped`` with the reason.
    """
    # past a few shapes of one function torch.compile would quietly stop compiling
    torch._dynamo.reset()
    found: Result = {}
    names = []
    for contender in (OURS, *PEERS[name]):
        reason = reason_against(name, axis, value, contender, options)
        if reason is None:
            names.append(contender)
        else:
            found[contender] = {"skipped": reason}
    plan = QUICK if options.quick else timing.Plan(rounds=15, budget=options.budget)
    with threads(value if axis == "threads" else torch.get_num_threads()):
        calls = _calls(scaled(WORKLOADS[name], axis, value), names, found)
        times = timing.interleave(calls, plan)
    for contender, samples in times.items():
        found[contender] = milliseconds(timing.summarize(list(samples.values())))
    return found


# -- the whole run ------------------------------------------------------------------


def _blank(options: argparse.Namespace) -> Result:
    command = shlex.join(["python", "-m", "bench.growth", *options.argv])
    return {
        "schema": 1,
        "kind": "growth",
        "quick": options.quick,
        "command": facts.without_paths(command),
        **facts.collect(),
        "series": {},
    }


def _series(name: str) -> Result:
    work = WORKLOADS[name]
    base = {
        "tasks": work.tasks,
        "steps": work.steps,
        "samples": work.support,
        "width": BASE_WIDTH[name],
        "threads": torch.get_num_threads(),
    }
    return {"title": work.title, "base": base, "axes": {}}


def _save(result: Result, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)


def run(options: argparse.Namespace, log: Callable[[str], None]) -> Result:
    """Measures what the options ask for, writing ``options.out`` as it goes."""
    resumed = options.resume and options.out.is_file()
    result = json.loads(options.out.read_text()) if resumed else _blank(options)
    for name in options.workloads:
        series = result["series"].setdefault(name, _series(name))
        for axis in options.axes:
            sizes = values(name, axis)[: 2 if options.quick else None]
            entry = series["axes"].setdefault(
                axis, {"values": list(sizes), "contenders": {}}
            )
            for value in sizes:
                field = entry["contenders"]
                if all(str(value) in field.get(n, {}) for n in (OURS, *PEERS[name])):
                    continue
                log(f"{name}: {axis} {value}")
                for contender, row in point(name, axis, value, options).items():
                    field.setdefault(contender, {})[str(value)] = row
                    log(f"  {contender}: {row.get('skipped') or row['median']}")
                _save(result, options.out)
    if not (options.quick or options.no_memory or "memory" in result):
        log("memory")
        result["memory"] = memory.growth_rows(steps=STEPS_OF_MEMORY)
    _save(result, options.out)
    return result


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench/results/latest-growth.json"))
    add("--workloads", nargs="+", choices=list(VALUES), default=list(VALUES))
    add("--axes", nargs="+", choices=AXES, default=list(AXES))
    add("--budget", type=float, default=5.0, help="seconds per contender and point")
    add("--first-call-limit", type=float, default=120.0, help="seconds to compile")
    add("--quick", action="store_true", help="two points an axis, few samples")
    add("--no-memory", action="store_true", help="leave the memory rows out")
    add("--resume", action="store_true", help="keep the points already in --out")
    add("--try", nargs=4, dest="trial", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.argv = list(argv)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measures growth from the command line."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.trial:
        name, axis, value, contender = options.trial
        try_here(name, axis, int(value), contender)
        return
    if "OMP_NUM_THREADS" in os.environ and not options.quick:
        raise SystemExit("OMP_NUM_THREADS is set and holds back torch alone: unset it")
    run(options, lambda text: print(text, file=sys.stderr, flush=True))


if __name__ == "__main__":
    main()
