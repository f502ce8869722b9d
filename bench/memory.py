"""Peak memory of one meta-gradient as the number of inner steps grows.

Every figure comes from a process of its own, which makes the workload and one
contender, computes two meta-gradients and reads its own peak. The peak is the
kernel's ``VmHWM``: ``getrusage``'s ``ru_maxrss`` survives ``exec`` on Linux, so in a
child it starts from the size of the parent that launched it.

What the chain of Hessian-vector products must keep from one step to the next is a
copy of the parameters; ``copies`` states the growth that this allows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.facts import without_paths

STEPS = (1, 5, 20)
WORKLOAD = "omniglot-conv-1"
CONTENDERS = ("fastmaml", "autograd loop", "vmap of grad", "vmap, HVP chain")
ALLOWANCE = 1.1


def peak_bytes() -> int:
    """Returns the peak resident memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(x for x in status.splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure_here(workload: str, contender: str, steps: int) -> dict[str, int]:
    """Measures in this process; it should have done nothing else."""
    from bench import contenders
    from bench.workloads import WORKLOADS

    work = WORKLOADS[workload].resized(steps=steps)
    taking_part = contenders.make(work, contender)
    tasks = taking_part.prepare(work.batch())
    before = peak_bytes()
    for _ in range(2):
        taking_part.meta_gradient(tasks)
    return {"before": before, "peak": peak_bytes()}


def measure(workload: str, contender: str, steps: int, limit: float) -> dict[str, Any]:
    """Measures in a fresh process.

    Returns:
        ``before`` and ``peak`` in bytes, or ``skipped`` with the reason.
    """
    command = [sys.executable, "-m", "bench.memory", workload, contender, str(steps)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"took longer than {limit:.0f} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"skipped": without_paths(last)}
    return json.loads(done.stdout.splitlines()[-1])


def copies(workload: str, steps: tuple[int, ...]) -> dict[str, int]:
    """Bytes of the parameter copies that more inner steps may add.

    Returns:
        ``parameters``: one copy; ``growth``: a copy for each task and each step from
        the first number of steps to the last; ``growth_per_worker``: the same if only
        the tasks in flight, one a thread, keep theirs.
    """
    import torch

    from bench.cost import FLOAT_BYTES
    from bench.workloads import WORKLOADS

    work = WORKLOADS[workload]
    one = sum(p.numel() for p in work.model().parameters()) * FLOAT_BYTES
    more = (steps[-1] - steps[0]) * one
    return {
        "parameters": one,
        "growth": more * work.tasks,
        "growth_per_worker": more * min(work.tasks, torch.get_num_threads()),
    }


def growth_rows(
    names: tuple[str, ...] = CONTENDERS,
    workload: str = WORKLOAD,
    steps: tuple[int, ...] = STEPS,
    limit: float = 300.0,
) -> dict[str, Any]:
    """Measures peak memory of contenders over numbers of inner steps.

    Returns:
        Ready for JSON: ``workload``, ``steps``, ``copies``, and per contender its
        measurements, growth in bytes and, where all ran, whether the growth stays
        within the parameter copies plus a tenth.
    """
    allowed = copies(workload, steps)
    rows: dict[str, Any] = {}
    for name in names:
        runs = {str(k): measure(workload, name, k, limit) for k in steps}
        rows[name] = {"runs": runs}
        first, last = runs[str(steps[0])], runs[str(steps[-1])]
        if "peak" in first and "peak" in last:
            grown = last["peak"] - first["peak"]
            rows[name]["growth"] = grown
            rows[name]["within"] = grown <= ALLOWANCE * allowed["growth"]
    return {
        "workload": workload,
        "steps": list(steps),
        "copies": allowed,
        "contenders": rows,
    }


def main() -> None:
    """Measures one case and prints it as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("workload")
    parser.add_argument("contender")
    parser.add_argument("steps", type=int)
    given = parser.parse_args()
    print(json.dumps(measure_here(given.workload, given.contender, given.steps)))


if __name__ == "__main__":
    main()
