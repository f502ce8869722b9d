"""Predicts what the workloads take on an H100. A prediction: no GPU has confirmed it.

    python -m bench.predict            # results/cuda-prediction.{json,md}
    python -m bench.predict --check    # exit 1 if the .md is not what the .json says

Recording the launches needs an extension with emulated CUDA (``bench.launches``), the
check does not. The model of a launch:

    time         overhead + max(bytes / bandwidth, operations / rate)
    bandwidth    what memory gives, or the bytes on their way to all resident blocks by
                 memory's latency, if that is less (Little's law); products copy
                 ahead, so for them half of their shared memory is on its way
    rate         of the unit, by the share of the busiest multiprocessor: a grid of 133
                 blocks takes as long as one of 264
    resident     blocks of a multiprocessor, as registers, shared memory and threads
                 allow

Not in it: caches (the sinusoid's data never leave them), zeros multiplied in padded
tiles, bank conflicts, the latency of a chain of dependent instructions. It says what to
expect if the kernels are good and where launching alone is too much, not what they do.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.launches import Launch

RESULTS = ROOT / "bench" / "results"
ARCH = "sm_90"
SHARED = 228 << 10  # bytes of a multiprocessor, compute capability 9.0
RESERVED = 1 << 10  # that each block loses to the system
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor
MOST = 255  # registers of a thread whose kernel is not among the compiled
PRODUCT = "bilinear_kernel"  # one family in a file per form
PASSES = ("forward", "backward", "tangent_forward", "tangent_backward")
FORMS = {f: f"bilinear_{f}.cu" for f in ("outputs", "inputs", "weights")}

SMALL = ("sinusoid-1", "sinusoid-5")  # tasks fit a block's shared memory
RESIDENT = "resident"  # the row of whole tasks in a block


@dataclass(frozen=True)
class Machine:
    """What a GPU is assumed to do.

    Data sheet of the H100 SXM (NVIDIA, 2023): 3.35 TB/s, 67 TFLOP/s in FP32, 989 in
    TF32 with sparsity, which is 495 dense. ``mma_share``: the kernels multiply by
    mma.sync, which on this chip reaches 63% of what wgmma does (Luo et al. 2024,
    arXiv 2402.13499, mean over types). 132 multiprocessors. The others are
    assumptions from common experience: memory answers after 0.6 µs, a thread has 16
    bytes on their way of each tensor that it loads from at once, and a step of a
    block that is all in shared memory (small product, barrier) takes 0.4 µs.

    Launching is assumed, too: 2.5 µs from the end of one kernel's work to the next
    one's, of which beginning early saves 1.0. Others have measured parts of it: 1.3 µs
    a launch of empty kernels in a graph on an H100 (Spector et al., Hazy Research,
    "Look Ma, No Bubbles!", May 2025), without a kernel's tail, its first fetch of
    instructions and parameters and its blocks' start; and 0.96 µs that programmatic
    dependent launch takes from the gap between two empty kernels
    (github.com/pegainfer-project/pegainfer, issue 569, July 2026; a GPU at 1.755 GHz).

    Attributes:
        bandwidth: bytes a second of memory.
        fp32: operations a second.
        tf32: operations a second of dense tensor cores.
        mma_share: of ``tf32`` that mma.sync reaches.
        multiprocessors: of the chip.
        overhead: seconds of a launch that waits for the one before, replayed.
        early: the same where the kernel begins early and awaits the one before.
        latency: seconds of memory.
        in_flight: bytes that a thread has on their way, of a tensor.
        phase: seconds of a step between barriers in a kernel that does whole tasks.
    """

    name: str = "H100 SXM, as specified"
    bandwidth: float = 3.35e12
    fp32: float = 67e12
    tf32: float = 495e12
    mma_share: float = 0.63
    multiprocessors: int = 132
    overhead: float = 2.5e-6
    early: float = 1.5e-6
    latency: float = 0.6e-6
    in_flight: int = 16
    phase: float = 0.4e-6

    def rate(self, unit: str) -> float:
        """Operations a second; 3xTF32 multiplies three times for one."""
        return self.fp32 if unit == "fp32" else self.tf32 * self.mma_share / 3


def resident_blocks(launch: Launch, registers: int) -> int:
    """Blocks that a multiprocessor holds at once, at least one."""
    granted = -(-registers // 8) * 8
    by_registers = REGISTERS // (granted * launch.block)
    by_shared = SHARED // (launch.shared + RESERVED)
    return max(1, min(by_registers, by_shared, THREADS // launch.block, BLOCKS))


def parts(launch: Launch, registers: int, on: Machine) -> dict[str, float]:
    """Seconds of a launch by memory, arithmetic and overhead."""
    resident = resident_blocks(launch, registers)
    at_once = min(launch.blocks, resident * on.multiprocessors)
    on_their_way = launch.block * launch.loads * on.in_flight
    if launch.form:
        on_their_way = max(on_their_way, launch.shared // 2)
    bandwidth = min(on.bandwidth, at_once * on_their_way / on.latency)
    rounds = -(-launch.blocks // on.multiprocessors)  # blocks of the busiest one
    share = rounds * on.multiprocessors / launch.blocks
    return {
        "memory": launch.bytes / bandwidth,
        "arithmetic": launch.flops / on.rate(launch.unit) * share,
        "overhead": on.early if launch.early else on.overhead,
    }


def seconds(launch: Launch, registers: int, on: Machine) -> float:
    """The model of this file's top."""
    p = parts(launch, registers, on)
    return p["overhead"] + max(p["memory"], p["arithmetic"])


# -- registers ----------------------------------------------------------------------


def registers_of(launch: Launch, kernels: Iterable[Mapping[str, Any]]) -> int:
    """The most registers of a float32 instance of a kernel on ``ARCH``.

    A recording knows kernels by name only, so the greediest instance stands for all; of
    a norm, that of the pass, which is its third template argument.
    """
    file = FORMS.get(launch.form) if launch.kernel == PRODUCT else None
    family, _, name = launch.kernel.partition(" ")  # "batch_norm backward", a pass
    family += "_kernel" if name else ""
    number = str(PASSES.index(name)) if name else ""
    found = [
        k["registers"]
        for k in kernels
        if k["arch"] == ARCH
        and k["name"].partition("<")[0] == family
        and "double" not in k["name"]
        and file in (None, k["file"])
        and (not number or re.split("[<,> ]+", k["name"])[3] == number)
    ]
    return max(found, default=MOST)


# -- results ------------------------------------------------------------------------


def grouped(launches: Sequence[Launch]) -> list[dict[str, Any]]:
    """Equal launches together, with their count."""
    counts: dict[Launch, int] = {}
    for launch in launches:
        counts[launch] = counts.get(launch, 0) + 1
    return [asdict(launch) | {"count": n} for launch, n in counts.items()]


def resident_phases(layers: int, steps: int) -> int:
    """Barriers of a whole task: csrc/cuda/task_resident.cu.

    One is behind the load; then there are two a layer, but for the last layer's one, in
    each of K support passes, of the query pass, and of K tangent passes.
    """
    return 1 + (2 * steps + 1) * max(2, 2 * layers - 1)


def workload_row(
    groups: Sequence[Mapping[str, Any]],
    kernels: Sequence[Mapping[str, Any]],
    on: Machine,
) -> dict[str, Any]:
    """Sums of a workload's launches, with the predicted seconds of each group added.

    Adam's launches count in ``step_ms`` alone.
    """
    total = {"memory": 0.0, "arithmetic": 0.0, "overhead": 0.0}
    launches, bytes_, flops, gradient, adam = 0, 0, 0, 0.0, 0.0
    for group in groups:
        launch = Launch(**{k: v for k, v in group.items() if k != "count"})
        registers, n = registers_of(launch, kernels), group["count"]
        spent = n * seconds(launch, registers, on)
        if launch.operation.startswith("optimizer"):
            adam += spent
            continue
        gradient += spent
        launches += n
        bytes_ += n * launch.bytes
        flops += n * launch.flops
        for name, value in parts(launch, registers, on).items():
            total[name] += n * value
    return {
        "launches": launches,
        "bytes": bytes_,
        "flops": flops,
        **{f"{name}_ms": 1e3 * value for name, value in total.items()},
        "gradient_ms": 1e3 * gradient,
        "step_ms": 1e3 * (gradient + adam),
    }


def with_resident(
    whole: Mapping[str, Any], kernels: Sequence[Mapping[str, Any]], on: Machine
) -> dict[str, Any]:
    """The same workload by the kernel that does a task in a block.

    Args:
        whole: its launches as groups, and the phases between its barriers.
        kernels: what nvcc told of all.
        on: the machine.
    """
    row = workload_row(whole["groups"], kernels, on)
    waits = 1e3 * whole["phases"] * on.phase
    return row | {k: row[k] + waits for k in ("gradient_ms", "step_ms")}


def collect(names: Sequence[str]) -> dict[str, Any]:
    """Records the workloads; the result lacks what ``predicted`` adds."""
    from bench import facts, launches
    from bench.workloads import WORKLOADS
    from fastmaml.compile import compile_module

    found = {}
    for name in names:
        workload = WORKLOADS[name]
        groups = grouped(launches.record(workload, memory="keep"))
        found[name] = {"title": workload.title, "work": workload.work, "groups": groups}
        if name in SMALL:
            report = compile_module(workload.model(), workload.loss, "mean")
            assert report.program is not None
            # a ReLU between two Linear layers is part of the first
            layers = sum(s.kind == "linear" for s in report.program.layers)
            found[name]["whole"] = {
                "groups": grouped(launches.record(workload)),
                "phases": resident_phases(layers, workload.steps),
            }
    where = facts.collect()
    return {
        "kind": "cuda-prediction",
        "device": "cuda",
        "quick": False,
        **{k: where[k] for k in ("date", "commit", "modified")},
        "workloads": found,
    }


def predicted(
    result: Mapping[str, Any], compiled: Mapping[str, Any], on: Machine
) -> dict[str, Any]:
    """The result with the machine, a row per workload and per kernel."""
    kernels = compiled["kernels"]
    rows, by_kernel = {}, {}
    for name, workload in result["workloads"].items():
        row = workload_row(workload["groups"], kernels, on)
        rows[name] = {"general": row}
        if "whole" in workload:
            rows[name][RESIDENT] = with_resident(workload["whole"], kernels, on)
        by_kernel[name] = kernel_rows(workload["groups"], kernels, on)
    return {
        **result,
        "machine": asdict(on),
        "registers": {k: compiled[k] for k in ("nvcc", "commit", "date")},
        "rows": rows,
        "kernels": by_kernel,
    }


def kernel_rows(
    groups: Sequence[Mapping[str, Any]],
    kernels: Sequence[Mapping[str, Any]],
    on: Machine,
) -> list[dict[str, Any]]:
    """One row a kernel and form, those that take longest first."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for group in groups:
        launch = Launch(**{k: v for k, v in group.items() if k != "count"})
        registers, n = registers_of(launch, kernels), group["count"]
        row = rows.setdefault(
            (launch.kernel, launch.form),
            {
                "kernel": launch.kernel,
                "form": launch.form,
                "launches": 0,
                "bytes": 0,
                "flops": 0,
                "ms": 0.0,
                "overhead_ms": 0.0,
                "fewest_blocks": launch.blocks,
                "resident_blocks": BLOCKS,
            },
        )
        row["launches"] += n
        row["bytes"] += n * launch.bytes
        row["flops"] += n * launch.flops
        row["ms"] += 1e3 * n * seconds(launch, registers, on)
        row["overhead_ms"] += 1e3 * n * parts(launch, registers, on)["overhead"]
        row["fewest_blocks"] = min(row["fewest_blocks"], launch.blocks)
        row["resident_blocks"] = min(
            row["resident_blocks"], resident_blocks(launch, registers)
        )
    return sorted(rows.values(), key=lambda r: -r["ms"])


def main(argv: Sequence[str] | None = None) -> int:
    """Records and predicts, or checks the written table."""
    from bench import prediction_table
    from bench.workloads import WORKLOADS

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument(
        "--again", action="store_true", help="predict from the launches recorded before"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    options = parser.parse_args(argv)
    place, text = (options.out / f"cuda-prediction.{e}" for e in ("json", "md"))
    compiled = json.loads((options.out / "cuda-kernels.json").read_text())
    if options.check or options.again:
        result = json.loads(place.read_text())
        kept = ("kind", "device", "quick", "date", "commit", "modified", "workloads")
        old, result = (
            result,
            predicted({k: result[k] for k in kept}, compiled, Machine()),
        )
        if options.check:
            same = old == result and text.read_text() == prediction_table.page(result)
            if not same:
                print(f"{text.name}: stale, run python -m bench.predict --again")
            return int(not same)
    else:
        try:
            result = predicted(collect(options.workloads), compiled, Machine())
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 2
    options.out.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(result, indent=1) + "\n")
    text.write_text(prediction_table.page(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
