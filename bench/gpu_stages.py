"""Stages of ``bench.gpu`` that compute: each runs in a process of its own.

    python -m bench.gpu_stages NAME --device cuda --out FILE [--tiny]

``ceilings``   copy bandwidth, and matrix products in FP32 and TF32
``kernels``    time of every kernel in a meta-gradient, against those ceilings and the
               bytes and operations that ``bench.predict`` has recorded for it
``compile``    calls the peers that compile once, many at a time, so that later
               processes find what they need in the compilers' caches
``small``      small meta-gradients of every kind of layer, for the sanitizers
``launching``  steps alone, and the bits of their gradients: run twice, with kernels
               that begin early and without (FASTMAML_EARLY_LAUNCH)

On the CPU (``--device cpu``) they do the same with the emulated backend, if there is
one, and with torch's operators in place of kernels: that tests the code, not a GPU.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, contenders, cost, peers, run, timing
from bench.cuda_kernels import short
from bench.workloads import WORKLOADS, Workload
from fastmaml.engines.placement import missing

CALLS = 5  # meta-gradients under the profiler
FORMS = ("outputs", "inputs", "weights")  # of bilinear_kernel's last template argument
SMALL = ("sinusoid-1", "omniglot-conv-1", "omniglot-fc", "mini-imagenet", "policy")
TINY = {"tasks": 2, "support": 5, "query": 5, "steps": 1}
COMPILERS = 10  # at a time
COMPILE_LIMIT = 150.0  # seconds for all of them
PREDICTION = ROOT / "bench" / "results" / "cuda-prediction.json"

Result = dict[str, Any]


def ours(workload: Workload, device: str) -> contenders.Contender:
    """Makes fastmaml's contender; on the CPU with CUDA emulated, where it is built."""
    emulated = device == "cpu" and missing("cuda_emulated") is None
    return contenders.ours(workload, "cuda_emulated" if emulated else "native", device)


# -- ceilings -----------------------------------------------------------------------


def ceilings(device: str, tiny: bool) -> Result:
    """Bytes and operations a second that the device reaches in torch's own kernels.

    Returns:
        ``copy_bytes``, read plus written; ``fp32_flops``, ``tf32_flops``.
    """
    size = 256 if tiny else 8192
    found = {"copy_bytes": cost.copy_bandwidth(8 if tiny else 2048, device=device)}
    for name, allowed in (("fp32_flops", False), ("tf32_flops", True)):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        found[name] = cost.matrix_peak(size, device=device)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


# -- kernels ------------------------------------------------------------------------


def key_of(name: str) -> tuple[str, str]:
    """(kernel, form) of a kernel as the profiler names it."""
    family, _, arguments = short(name).partition("<")
    if family != "bilinear_kernel":
        return family, ""
    last = arguments.rstrip("> ").rpartition(",")[2].strip()
    return family, FORMS[int(last)] if last.isdigit() else ""


def recorded_kernels(workload: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    """What ``bench.predict`` has recorded of a workload, by (kernel, form)."""
    if not PREDICTION.exists():
        return {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in json.loads(PREDICTION.read_text())["kernels"].get(workload, []):
        name, _, kind = row["kernel"].partition(" ")  # "batch_norm backward"
        key = (f"{name}_kernel" if kind else name, row["form"])
        sums = rows.setdefault(key, dict.fromkeys(("bytes", "flops", "ms"), 0))
        for what in sums:
            sums[what] += row[what]
    return rows


def kernel_rows(
    events: Sequence[tuple[str, float]],
    calls: int,
    known: Mapping[tuple[str, str], Mapping[str, Any]],
    peak: Mapping[str, float],
) -> list[Result]:
    """One row a kernel and form, those that take longest first.

    Args:
        events: (name, seconds) of every launch in ``calls`` meta-gradients.
        calls: how many there were.
        known: (kernel, form) -> bytes, flops and predicted ms of one meta-gradient.
        peak: of ``ceilings``.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    for name, seconds in events:
        sums.setdefault(key_of(name), []).append(seconds)
    rows = []
    for key, times in sums.items():
        spent = sum(times) / calls
        row: Result = {
            "kernel": key[0],
            "form": key[1],
            "launches": len(times) / calls,
            "ms": 1e3 * spent,
        }
        if spent > 0 and (facts := known.get(key)):
            moved, done = facts["bytes"] / spent, facts["flops"] / spent
            row |= {
                "percent_of_copy": 100 * moved / peak["copy_bytes"],
                "percent_of_fp32": 100 * done / peak["fp32_flops"],
                "percent_of_tf32": 100 * done / peak["tf32_flops"],
                "predicted_ms": facts["ms"],
            }
        rows.append(row)
    return sorted(rows, key=lambda r: -r["ms"])


def profiled(call: Callable[[], object], calls: int, device: str) -> list:
    """(name, seconds) of every kernel, or on the CPU of every operator of torch."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device != "cpu"
    wanted = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=wanted) as seen:
        for _ in range(calls):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found = []
    for event in seen.events():
        seconds = 1e-6 * (event.device_time if on_gpu else event.cpu_time)
        if event.device_type == kind and not event.name.startswith("Mem"):
            found.append((event.name, seconds))
    return found


def kernels(device: str, tiny: bool) -> Result:
    """Times the kernels of every workload's meta-gradient, in the order of a table."""
    peak = ceilings(device, tiny)
    found = {}
    for name, workload in WORKLOADS.items():
        if tiny:
            if name != "sinusoid-1":
                continue
            workload = workload.resized(**TINY)
        contender = ours(workload, device)
        tasks = contender.prepare(workload.batch())
        for _ in range(3):
            contender.meta_gradient(tasks)
        events = profiled(
            lambda c=contender, t=tasks: c.meta_gradient(t), CALLS, device
        )
        known = {} if tiny else recorded_kernels(name)
        found[name] = kernel_rows(events, CALLS, known, peak)
    return {"ceilings": peak, "workloads": found}


# -- the others ---------------------------------------------------------------------


def compile_peers(device: str, tiny: bool) -> Result:
    """First calls of the peers that compile: workload -> peer -> ``run.probe``'s."""
    asked = [
        (workload, name)
        for workload in WORKLOADS.values()
        for name in contenders.names()
        if contenders.compiles(name)
        and not contenders.reason_to_skip(workload, name, False, device)
    ]
    if tiny:
        asked = asked[:1]
    end = time.perf_counter() + COMPILE_LIMIT

    def probe(one: tuple[Workload, str]) -> Result:
        return run.probe(*one, max(1.0, end - time.perf_counter()), device)

    with ThreadPoolExecutor(COMPILERS) as pool:
        told = list(pool.map(probe, asked))
    found: Result = {}
    for (workload, name), answer in zip(asked, told, strict=True):
        found.setdefault(workload.name, {})[name] = answer
    return found


def small(device: str, tiny: bool) -> Result:
    """Relative errors of small meta-gradients followed by Adam.

    Raises:
        SystemExit: if one is off by more than ``run.WRONG``.
    """
    found = {}
    for name in SMALL[:1] if tiny else SMALL:
        workload = WORKLOADS[name].resized(**TINY)
        contender = ours(workload, device)
        tasks = contender.prepare(workload.batch())
        _, got = contender.meta_gradient(tasks)
        model = workload.model()
        problem = peers.make_problem(workload, model)
        params = dict(model.named_parameters())
        _, want = peers.reference(problem, params, workload.batch())
        found[name] = peers.error(contender.gradients(got), want)
        contender.meta_step(tasks)
        if contender.finish is not None:
            contender.finish(None)
    if wrong := {n: e for n, e in found.items() if not e <= run.WRONG}:
        raise SystemExit(f"wrong meta-gradients: {wrong}")
    return found


def launching(device: str, tiny: bool) -> Result:
    """Times fastmaml's steps, whatever the environment says of launches.

    Returns:
        workload -> ``bits``, of loss and gradients after one call, the same however
        kernels are launched; milliseconds of ``meta_step`` and ``captured_step``.
    """
    found = {}
    plan = timing.Plan(min_sample=0.01 if tiny else 0.2)
    for name in SMALL[:1] if tiny else SMALL:
        workload = WORKLOADS[name]
        if tiny:
            workload = workload.resized(**TINY)
        contender = ours(workload, device)
        tasks = contender.prepare(workload.batch())
        loss, got = contender.meta_gradient(tasks)
        bits = hashlib.sha256()
        for value in (loss, *contender.gradients(got).values()):
            bits.update(value.detach().cpu().numpy().tobytes())
        calls: dict[str, Callable[[], object]] = {
            "meta_step": functools.partial(contender.meta_step, tasks)
        }
        if contender.captured_step is not None:
            calls["captured_step"] = contender.captured_step(tasks)  # type: ignore
        found[name] = {"bits": bits.hexdigest()[:16]}
        for what, call in calls.items():
            times = timing.solo(timing.finishing(call, contender.finish), plan)
            found[name][what] = 1e3 * min(times)
    return found


STAGES: dict[str, Callable[[str, bool], Result]] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "compile": compile_peers,
    "small": small,
    "launching": launching,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one stage and writes its result."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_stages")
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    result = STAGES[options.stage](options.device, options.tiny)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
