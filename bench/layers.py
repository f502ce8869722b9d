"""Where a meta-gradient spends its time: every pass of every layer against the core.

    python -m bench.layers [--workloads NAME ...] [--out FILE.json] [--top N]

One core runs each pass of each layer alone, at the samples the meta-gradient uses,
over the data of several tasks in turn. A row's gap is what the pass takes beyond its
roofline time (``bench.roofline``), times the calls in one meta-gradient, in
milliseconds of one core; with n threads at work on different tasks the clock on the
wall sees an n-th of it. What the rows together leave of the measured meta-gradient
(driver, threads, data that other tasks pushed out of the cache) stands below them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import contenders, cost, facts, timing
from bench.roofline import FLOAT_BYTES, Ceilings, Need, measure_ceilings, pass_need
from bench.workloads import WORKLOADS, Workload
from fastmaml import _native, get_num_threads
from fastmaml.compile import compile_module

MOST_BYTES = 256 << 20  # of the tasks that a pass takes in turn
MOST_TASKS = 8
PLAN = timing.Plan(rounds=5, min_sample=0.004)
QUICK = timing.Plan(rounds=2, min_sample=0.0005)

Row = dict[str, Any]
Timer = Callable[[int], float]


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        layer: its name, or "-" for what concerns the whole network.
        kind: of the layer, or the operation's family.
        operation: the pass or operation.
        samples: of one task.
        calls: in one meta-gradient.
        need: what a call takes at least.
        time: (repeats) -> seconds of one call.
    """

    layer: str
    kind: str
    operation: str
    samples: int
    calls: int
    need: Need
    time: Timer


def program_of(workload: Workload) -> Any:
    """Compiles a workload's network for the engine."""
    lowered = compile_module(workload.model(), workload.loss).program
    assert lowered is not None, "every workload's network compiles"
    layers = [(s.kind, s.name, dict(s.attributes)) for s in lowered.layers]
    shape = list(workload.resized(tasks=1).batch().support_x.shape[2:])
    loss = lowered.loss
    return _native.core().Program(shape, layers, loss.kind, loss.reduction)


class Benches:
    """The extension's ``LayerBench`` of a program by samples, made when first timed."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._made: dict[int, Any] = {}

    def _of(self, samples: int) -> Any:
        """Data of so many tasks that they don't stay cached together, within reason."""
        if samples not in self._made:
            make = _native.core().LayerBench
            one = make(self._program, samples, 1)
            tasks = max(1, min(MOST_TASKS, MOST_BYTES // one.bytes_per_task))
            self._made[samples] = make(self._program, samples, tasks)
        return self._made[samples]

    def timer(self, samples: int, method: str, *arguments: Any) -> Timer:
        """Returns (repeats) -> seconds of one call of a method of ``LayerBench``."""
        return lambda repeats: getattr(self._of(samples), method)(*arguments, repeats)


def pass_calls(workload: Workload, kept: bool) -> list[tuple[str, int, int]]:
    """(pass, samples, calls) of one meta-gradient.

    Args:
        workload: says T, S, Q, K.
        kept: whether the activations of every step wait for the chain; else all but
            the last step's are computed again there.
    """
    tasks, steps = workload.tasks, workload.steps
    once = tasks * steps
    twice = once if kept else once + tasks * max(steps - 1, 0)
    support, query = workload.support, workload.query
    return [
        ("forward", support, twice),
        ("backward", support, twice),
        ("tangent_forward", support, once),
        ("tangent_backward", support, once),
        ("forward", query, tasks),
        ("backward", query, tasks),
    ]


def _summed(counts: Iterable[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Adds up the counts of equal keys: S may equal Q."""
    total: dict[Any, int] = {}
    for key, count in counts:
        total[key] = total.get(key, 0) + count
    return list(total.items())


def _pass_cases(
    workload: Workload, program: Any, benches: Benches, kept: bool
) -> Iterable[Case]:
    passes = [((name, n), calls) for name, n, calls in pass_calls(workload, kept)]
    for index, layer in enumerate(_native.core().bench_layers(program)):
        for (name, samples), calls in _summed(passes):
            if name != "forward" and not layer["trained"]:
                continue
            yield Case(
                layer=layer["name"],
                kind=layer["kind"],
                operation=name,
                samples=samples,
                calls=calls,
                need=pass_need(layer, name, samples),
                time=benches.timer(samples, "time_pass", index, name),
            )


def vector_needs(workload: Workload, parameters: int) -> dict[str, tuple[int, Need]]:
    """Operation on a task's whole parameters -> calls in a meta-gradient, need.

    Args:
        workload: says T and K.
        parameters: P.
    """
    tasks, once = workload.tasks, workload.tasks * workload.steps
    arrays = {  # calls, arrays of P touched, operations per element
        "load_parameters": (1, 2, 0),
        "store_parameters": (1, 2, 0),
        "descend": (once, 3, 2),
        "scale_by_rates": (once, 2, 1),
        "add": (once + tasks, 3, 2),
        "copy": (tasks, 2, 0),
        "mean_rows": (1, tasks + 1, tasks),
    }
    return {
        name: (calls, Need(operations * parameters, count * parameters * FLOAT_BYTES))
        for name, (calls, count, operations) in arrays.items()
    }


def _other_cases(
    workload: Workload, program: Any, benches: Benches, kept: bool
) -> Iterable[Case]:
    support, tasks = workload.support, workload.tasks
    count = sum(size for _, size in program.parameters)
    for name, (calls, need) in vector_needs(workload, count).items():
        if name == "mean_rows":
            time = benches.timer(support, "time_mean", tasks)
        else:
            time = benches.timer(support, "time_vector", name)
        yield Case("-", "vector", name, 0, calls, need, time)
    shape = workload.resized(tasks=1).batch().support_x.shape[2:]
    if len(shape) == 3 and shape[0] > 1:  # one channel needs no transpose
        name = "to_channels_last"
        for samples, calls in _summed([(support, tasks), (workload.query, tasks)]):
            moved = Need(0, 2 * FLOAT_BYTES * samples * shape.numel())
            time = benches.timer(samples, "time_vector", name)
            yield Case("-", "staging", name, samples, calls, moved, time)
    for hessian, name in ((False, "forward"), (True, "tangent_forward")):
        passes = pass_calls(workload, kept)
        for samples, calls in _summed([(n, c) for p, n, c in passes if p == name]):
            elements = samples * (3 * program.outputs + program.target_size)
            need = Need(10 * samples * program.outputs, FLOAT_BYTES * elements)
            time = benches.timer(samples, "time_loss", hessian)
            operation = "hessian" if hessian else "value"
            yield Case("-", "loss", operation, samples, calls, need, time)


def cases(workload: Workload, kept: bool = True) -> list[Case]:
    """Everything a meta-gradient of a workload is made of.

    Args:
        workload: at the sizes to time.
        kept: see ``pass_calls``.

    Raises:
        NativeUnavailable: if the extension can't be loaded.
    """
    program = program_of(workload)
    benches = Benches(program)
    return [
        *_pass_cases(workload, program, benches, kept),
        *_other_cases(workload, program, benches, kept),
    ]


def measure(case: Case, plan: timing.Plan) -> timing.Summary:
    """Times a case: seconds of one call over ``plan.rounds`` samples."""
    once = case.time(1)
    repeats = max(1, round(plan.min_sample / max(once, 1e-9)))
    if repeats > 1:  # the first call alone says little where it lasts microseconds
        repeats = max(1, round(plan.min_sample / max(case.time(repeats), 1e-9)))
    return timing.summarize([case.time(repeats) for _ in range(plan.rounds)])


def row(workload: str, case: Case, spent: timing.Summary, ceilings: Ceilings) -> Row:
    """What the table and the file say of a case."""
    level = ceilings.level(case.need.bytes)
    seconds, need = spent.median, case.need
    gap = max(0.0, seconds - ceilings.seconds(need))
    return {
        "workload": workload,
        "layer": case.layer,
        "kind": case.kind,
        "operation": case.operation,
        "samples": case.samples,
        "calls": case.calls,
        "seconds": dataclasses.asdict(spent),
        "operations": need.operations,
        "bytes": need.bytes,
        "percent_of_operations": 100 * need.operations / seconds / ceilings.operations,
        "percent_of_bandwidth": 100 * need.bytes / seconds / ceilings.bandwidth[level],
        "level": level,
        "total_ms": 1e3 * seconds * case.calls,
        "gap_ms": 1e3 * gap * case.calls,
    }


def whole(workload: Workload, plan: timing.Plan) -> tuple[float, bool]:
    """Returns seconds of the whole meta-gradient, all threads, and whether it kept.

    It goes through the learner, as in ``bench.run``.
    """
    learner = contenders.make_learner(workload, "native", workload.model())
    tasks = workload.batch()

    def call() -> None:
        learner.meta_loss(tasks).backward()

    call()
    spent = timing.summarize([timing.time_call(call, 3) for _ in range(plan.rounds)])
    engine = learner._engine  # the plan is no part of what every engine can do
    return spent.median, bool(engine.plan.kept)


def run_workload(
    workload: Workload, ceilings: Ceilings, plan: timing.Plan
) -> tuple[list[Row], dict[str, float]]:
    """Times everything a workload's meta-gradient is made of.

    Returns:
        Its rows, and in milliseconds of one core: the measured meta-gradient, the sum
        of the rows, of their rooflines and what is left unaccounted for.
    """
    seconds, kept = whole(workload, plan)
    rows = [
        row(workload.name, case, measure(case, plan), ceilings)
        for case in cases(workload, kept)
    ]
    threads = min(get_num_threads(), workload.tasks)
    parts = sum(r["total_ms"] for r in rows)
    total = {
        "meta_gradient_ms": 1e3 * seconds,
        "threads": threads,
        "core_ms": 1e3 * seconds * threads,
        "parts_ms": parts,
        "gap_ms": sum(r["gap_ms"] for r in rows),
        "unaccounted_ms": 1e3 * seconds * threads - parts,
    }
    return rows, total


# -- what is printed ----------------------------------------------------------------

HEAD = (
    f"{'workload':16} {'layer':22} {'operation':17} {'samples':>7} {'calls':>6} "
    f"{'us/call':>10} {'Mop':>9} {'KiB':>9} {'%op':>5} {'%bw':>5} {'from':>6} "
    f"{'ms':>8} {'gap ms':>8}"
)


def table(rows: Sequence[Row], top: int | None = None) -> str:
    """Rows by falling gap, the first ``top`` of them."""
    ranked = sorted(rows, key=lambda r: -r["gap_ms"])[:top]
    lines = [HEAD]
    for r in ranked:
        name = r["kind"] if r["layer"] == "-" else f"{r['layer']} {r['kind']}"
        lines.append(
            f"{r['workload']:16} {name[:22]:22} {r['operation']:17} {r['samples']:7} "
            f"{r['calls']:6} {1e6 * r['seconds']['median']:10.2f} "
            f"{r['operations'] / 1e6:9.3f} {r['bytes'] / 1024:9.1f} "
            f"{r['percent_of_operations']:5.0f} {r['percent_of_bandwidth']:5.0f} "
            f"{r['level']:>6} {r['total_ms']:8.3f} {r['gap_ms']:8.3f}"
        )
    return "\n".join(lines)


def totals_table(totals: dict[str, dict[str, float]]) -> str:
    """One line a workload, milliseconds of one core."""
    lines = [
        f"{'workload':16} {'measured':>9} {'x threads':>9} {'sum of parts':>12} "
        f"{'their gap':>9} {'unaccounted':>11}"
    ]
    for name, t in totals.items():
        lines.append(
            f"{name:16} {t['meta_gradient_ms']:9.3f} {t['core_ms']:9.3f} "
            f"{t['parts_ms']:12.3f} {t['gap_ms']:9.3f} {t['unaccounted_ms']:11.3f}"
        )
    return "\n".join(lines)


def ceilings_text(ceilings: Ceilings, matrix: float) -> str:
    """The ceilings in one line."""
    streams = ", ".join(
        f"{k} {v / 1e9:.0f} GB/s" for k, v in ceilings.bandwidth.items()
    )
    return (
        f"one core: {ceilings.operations / 1e9:.0f} GFLOP/s of multiply-adds "
        f"(torch's matrix product on one thread {matrix / 1e9:.0f}); {streams}"
    )


def run(names: Sequence[str], plan: timing.Plan) -> dict[str, Any]:
    """Times the workloads.

    Returns:
        Ready for JSON: facts, ``ceilings``, ``rows`` and ``totals``.
    """
    ceilings = measure_ceilings()
    rows: list[Row] = []
    totals = {}
    for name in names:
        print(name, file=sys.stderr, flush=True)
        found, totals[name] = run_workload(WORKLOADS[name], ceilings, plan)
        rows += found
    return {
        "schema": 1,
        "kind": "layers",
        "quick": plan == QUICK,
        **facts.collect(),
        "ceilings": {
            **dataclasses.asdict(ceilings),
            "matrix_operations": cost.matrix_peak(size=1024, threads=1),
        },
        "rows": rows,
        "totals": totals,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Times layers from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=__doc__)
    names = list(WORKLOADS)
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--top", type=int, help="rows to print (default all)")
    parser.add_argument("--quick", action="store_true", help="few, short samples")
    options = parser.parse_args(argv)
    result = run(options.workloads, QUICK if options.quick else PLAN)
    known = {k: v for k, v in result["ceilings"].items() if k != "matrix_operations"}
    print(ceilings_text(Ceilings(**known), result["ceilings"]["matrix_operations"]))
    print(table(result["rows"], options.top))
    print(totals_table(result["totals"]))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
