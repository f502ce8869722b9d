"""The predictions of ``bench.predict`` as a page of tables. Nothing needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.targets import NONE, digits

# Milliseconds aimed at on an H100: of a meta-gradient, or of a step with Adam.
TARGETS = {
    "sinusoid-1": 0.015,
    "omniglot-conv-1": 0.30,
    "mini-imagenet": 3.0,
    "policy": 1.0,
}
WITH_ADAM = ("sinusoid-1",)
SHOWN = 8  # kernels of a workload

_HEAD = (
    "workload",
    "launches",
    "MB",
    "GFLOP",
    "memory, ms",
    "arithmetic, ms",
    "launching, ms",
    "meta-gradient, ms",
    "with Adam, ms",
    "target, ms",
)
_KERNELS = (
    "kernel",
    "launches",
    "MB",
    "GFLOP",
    "predicted, ms",
    "of that launching",
    "fewest blocks",
    "blocks a multiprocessor",
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _work(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['launches']:,}",
        digits(row["bytes"] / 1e6),
        digits(row["flops"] / 1e9),
    ]


def target(name: str) -> str:
    """The cell of a workload's target."""
    if name not in TARGETS:
        return NONE
    return f"{TARGETS[name]:g}" + (" with Adam" if name in WITH_ADAM else "")


def row_cells(name: str, row: Mapping[str, Any], aim: str) -> list[str]:
    """One row of the first table."""
    spent = [row.get(f"{p}_ms") for p in ("memory", "arithmetic", "overhead")]
    times = [*spent, row["gradient_ms"], row["step_ms"]]
    return [name, *_work(row), *map(digits, times), aim]


def kernel_cells(row: Mapping[str, Any]) -> list[str]:
    """One row of a workload's table of kernels."""
    form = f", {row['form']}" if row["form"] else ""
    return [
        f"`{row['kernel']}`{form}",
        *_work(row),
        digits(row["ms"]),
        f"{100 * row['overhead_ms'] / row['ms']:.0f}%",
        f"{row['fewest_blocks']:,}",
        str(row["resident_blocks"]),
    ]


def page(result: Mapping[str, Any]) -> str:
    """The whole page in markdown."""
    on, registers = result["machine"], result["registers"]
    state = " with local changes" if result["modified"] else ""
    rows = []
    for name, kinds in result["rows"].items():
        rows.append(row_cells(name, kinds["general"], target(name)))
        if "resident" in kinds:
            label = f"{name}, a block a task"
            rows.append(row_cells(label, kinds["resident"], target(name)))
    lines = [
        "# Predicted times on an H100",
        "",
        "**A prediction. No kernel has run on a GPU, and nothing here is measured.**",
        "",
        f"Launches recorded at commit {result['commit']}{state}, "
        f"{result['date'][:10]}; registers from nvcc {registers['nvcc']}, commit "
        f"{registers['commit']}. Written by `python -m bench.predict`, which explains "
        "the model: a launch takes its overhead plus the larger of memory's and "
        "arithmetic's time.",
        "",
        f"Assumed: {on['name']}, {on['bandwidth'] / 1e12:g} TB/s, "
        f"{on['fp32'] / 1e12:g} TFLOP/s in FP32, {on['tf32'] / 1e12:g} in dense TF32, "
        f"{on['mma_share']:.0%} of that by mma.sync, three products for one in "
        f"float32; {on['multiprocessors']} multiprocessors; "
        f"{1e6 * on['overhead']:g} µs for a dependent launch of a replayed graph, "
        f"{1e6 * on['early']:g} µs where it begins early, behind one of ours (neither "
        "is measured here, `bench/predict.py` names what others have); "
        f"{1e6 * on['latency']:g} µs until memory answers, {on['in_flight']} bytes of "
        "a thread and tensor on their way, of products half of their shared memory.",
        "",
        "Memory's and arithmetic's milliseconds add up over launches whichever is "
        "larger, so the meta-gradient's are between their sum and their maximum, with "
        "launching. `a block a task`: by `csrc/cuda/task_resident.cu`, if possible, "
        f"{1e6 * on['phase']:g} µs between barriers, FP32 throughout.",
        "",
        *_table(_HEAD, rows),
    ]
    for name, kernels in result["kernels"].items():
        lines += ["", f"## {name}", ""]
        lines += [f"{result['workloads'][name]['title']}, "
                  f"{result['workloads'][name]['work']}."]  # fmt: skip
        lines += ["", *_table(_KERNELS, [kernel_cells(k) for k in kernels[:SHOWN]])]
    return "\n".join(lines) + "\n"
