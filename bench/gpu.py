"""Runs all that a GPU is needed for, stage by stage, and writes one JSON file.

    bench/gpu.sh                # checks that there is a GPU, then runs this
    python -m bench.gpu --dry   # on the CPU with CUDA emulated, tiny: tests the script

Every stage is a process with a time limit of its own. One that fails or takes too long
stands in the file with the tail of what it said, and the others still run, as long as
``--budget`` lasts; the file is written after each. What is timed runs alone.
``workload NAME`` are those of ``bench.run``: all contenders on the same card in the
same process, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import ROOT

TAIL = 3000  # characters of a stage's output that are kept
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SUMMARY = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected)")
# JAX takes memory as it needs it, and multiplies in float32 as everyone else
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "fastmaml-jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}

LAUNCHES = {"early": "1", "in turn": "0"}  # FASTMAML_EARLY_LAUNCH

LEAST = 5.0  # seconds without which no stage is started
FIRST = ("sinusoid-1", "omniglot-conv-1", "mini-imagenet", "policy")  # have targets

Result = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: in the result.
        command: what runs, in the root of the checkout.
        limit: seconds after which it is ended, with all that it has started.
        out: file that it writes its own result to, if it has one.
        environment: beside that of this process.
        together: stages in a row that share this name run at the same time; nothing
            that is timed has one.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    out: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    together: str = ""


# -- running one --------------------------------------------------------------------


def start(stage: Stage, log: Path) -> subprocess.Popen[bytes]:
    """Starts a stage in a process group of its own, its output into a file."""
    with log.open("wb") as target:
        return subprocess.Popen(
            stage.command,
            cwd=ROOT,
            stdout=target,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, **stage.environment},
            start_new_session=True,
        )


def wait(
    stage: Stage,
    process: subprocess.Popen[bytes],
    log: Path,
    began: float,
    limit: float,
) -> Result:
    """Waits until a stage ends, or ends it, and tells how it went.

    Returns:
        ``status`` (ok, failed, timed out), ``seconds``, ``limit``, and what else there
        is: ``exit``, ``tail`` of a stage that is not ok, ``tests`` counted by pytest.
        Stages of one batch are waited for in turn, so ``seconds`` is at most when one
        was seen to have ended.
    """
    left = max(0.1, limit - (time.perf_counter() - began))
    try:
        code = process.wait(left)
        status = "ok" if code == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code, status = None, "timed out"
    result: Result = {
        "status": status,
        "seconds": round(time.perf_counter() - began, 1),
        "limit": round(limit, 1),
    }
    from bench.facts import without_paths

    text = without_paths(log.read_text(errors="replace"))
    if status != "ok":
        result |= {"exit": code, "tail": text[-TAIL:]}
    if "pytest" in stage.command:
        lines = text.strip().splitlines() or [""]
        result["tests"] = {w: int(n) for n, w in SUMMARY.findall(lines[-1])}
    return result


# -- which there are ----------------------------------------------------------------


def tests_of_backends() -> list[str]:
    """Files whose tests run on every backend that a build has, or on ``cuda``."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text()
        if "backends.usable" in text or "backends.why_not" in text:
            found.append(f"tests/{path.name}")
        elif "on_every_backend" in text:
            found.append(f"tests/{path.name}")
    return found


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def stages(folder: Path, dry: bool, workloads: Sequence[str]) -> list[Stage]:
    """All stages in their order.

    Args:
        folder: of the files that they write.
        dry: on the CPU, tiny, with the extension that is there.
        workloads: names.
    """
    device = "cpu" if dry else "cuda"
    python = sys.executable
    tiny = ("--tiny",) if dry else ()

    def own(name: str, limit: float, together: str = "") -> Stage:
        out = folder / f"{name}.json"
        command = (python, "-m", "bench.gpu_stages", name, "--device", device)
        command = (*command, "--out", str(out), *tiny)
        return Stage(name, command, limit, out, together=together)

    found = []
    if not dry:
        build = {"FASTMAML_CUDA": "ON", "FASTMAML_ISA": "native"}
        command = (python, "setup.py", "-q", "build_ext", "--inplace")
        found.append(Stage("build", command, 240, environment=build))
    backend = "cuda_emulated" if dry else "cuda"
    files = ["tests/test_captured_step.py"] if dry else tests_of_backends()
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    pytest += ["-k", "sinusoid and adam"] if dry else []
    pytest += ["-n", "8"] if not dry and _has("xdist") else []
    only = {"FASTMAML_TEST_BACKENDS": backend}
    tests = Stage("tests", tuple(pytest), 170, environment=only, together="checks")
    small = own("small", 120, "checks")
    compiled = own("compile", 170, "checks")
    found += [tests, small, compiled]
    for tool in () if dry else TOOLS:
        out = folder / f"{tool}.json"
        inner = [str(out) if c == str(small.out) else c for c in small.command]
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *inner)
        name = f"sanitizer {tool}"
        found.append(Stage(name, command, 170, out, together="checks"))
    found += [own("ceilings", 40), own("kernels", 60)]
    for how, allowed in LAUNCHES.items():
        one = own("launching", 40)
        out = folder / f"launching {how}.json"
        command = tuple(str(out) if c == str(one.out) else c for c in one.command)
        environment = {"FASTMAML_EARLY_LAUNCH": allowed}
        found.append(Stage(f"launching {how}", command, 40, out, environment))
    for name in workloads:
        out = folder / f"workload-{name}.json"
        command = (python, "-m", "bench.run", "--device", device, "--workloads", name)
        size = ("--quick", *tiny, "--rounds", "2", "--peers", "vmap of grad")
        size = (*size, "--engines", "cuda_emulated")
        full = ("--budget", "0.5", "--rounds", "11", "--first-call-limit", "30")
        full = (*full, "--probed", str(compiled.out))
        command = (*command, "--no-memory", "--out", str(out), *(size if dry else full))
        found.append(Stage(f"workload {name}", command, 150 if dry else 90, out))
    return found


# -- all of them --------------------------------------------------------------------


def merge(result: Result, stage: Stage) -> None:
    """Takes what a stage has written into the result, as far as it came."""
    if stage.out is None or not stage.out.exists():
        return
    got = json.loads(stage.out.read_text())
    if not stage.name.startswith("workload "):
        result[stage.name.replace("sanitizer ", "errors under ")] = got
        return
    result["workloads"] |= got["workloads"]
    for what, value in got["peak"].items():
        if what == "core":  # of a CPU, in a dry run
            continue
        result["peak"][what] = max(value, result["peak"].get(what, 0.0))
    result["plan"] = got["plan"]


def shares(result: Result) -> None:
    """Relates everyone's time to the best FP32 product of the run."""
    from bench import cost

    peak, found = result["peak"], result.get("ceilings", {})
    for what, name in (("copy_bytes", "copy_bytes"), ("matrix_flops", "fp32_flops")):
        best = max(peak.get(what, 0.0), found.get(name, 0.0))
        if best:
            peak[what] = best
    for workload in result["workloads"].values():
        for row in workload["contenders"].values():
            seconds = row["meta_gradient"]["median"] / 1e3
            flops = workload["cost"]["flops"]
            row["percent_of_peak"] = cost.percent_of_peak(
                flops, seconds, peak["matrix_flops"]
            )


def _facts(device: str) -> Result:
    """Of a fresh process, which loads the extension that has just been built."""
    code = (
        "import json; from bench import facts; print(json.dumps(facts.collect({!r})))"
    )
    command = [sys.executable, "-c", code.format(device)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"facts": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def _batch(chosen: Sequence[Stage], logs: Path, end: float) -> list[Result]:
    """Runs stages at the same time, none beyond ``end``."""
    began = time.perf_counter()
    if end - began < LEAST:
        told = {"status": "left out", "seconds": 0, "tail": "no time was left"}
        return [dict(told) for _ in chosen]
    running: list[subprocess.Popen[bytes] | str] = []
    results = []
    try:
        for i, stage in enumerate(chosen):
            try:
                running.append(start(stage, logs / str(i)))
            except OSError as error:
                running.append(f"{Path(stage.command[0]).name}: {error.strerror}")
        for i, (stage, process) in enumerate(zip(chosen, running, strict=True)):
            if isinstance(process, str):
                results.append({"status": "failed", "seconds": 0, "tail": process})
                continue
            limit = min(stage.limit, end - began)
            results.append(wait(stage, process, logs / str(i), began, limit))
    finally:  # an interrupted run leaves nothing behind
        for process in running:
            if not isinstance(process, str) and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return results


def run(
    chosen: Sequence[Stage],
    out: Path,
    dry: bool,
    commit: str | None = None,
    budget: float = 570.0,
) -> Result:
    """Runs the stages and writes the result after each."""
    end = time.perf_counter() + budget
    now = datetime.datetime.now(datetime.timezone.utc)
    result: Result = {
        "kind": "gpu",
        "device": "cpu" if dry else "cuda",
        "quick": dry,
        "date": now.isoformat("T", "seconds"),
        "command": "bench/gpu.sh" + (" --dry" if dry else ""),
        "peak": {},
        "stages": {},
        "workloads": {},
    }

    def save() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")

    names = {s.name: s.together or s.name for s in chosen}
    for _, group in itertools.groupby(chosen, key=lambda s: names[s.name]):
        batch = list(group)
        with tempfile.TemporaryDirectory() as logs:
            told = _batch(batch, Path(logs), end)
        for stage, one in zip(batch, told, strict=True):
            result["stages"][stage.name] = one
            merge(result, stage)
            print(f"{stage.name}: {one['status']}, {one['seconds']} s", flush=True)
        save()
    result |= {k: v for k, v in _facts(result["device"]).items() if k != "date"}
    result["commit"] = commit or result.get("commit")
    shares(result)
    save()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs from the command line.

    Returns:
        0 if every stage went well, else 1.
    """
    from bench.workloads import WORKLOADS

    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.json"))
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--only", nargs="+", help="stages, by the start of their names")
    parser.add_argument("--commit", help="of a checkout that has lost its .git")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds of all")
    options = parser.parse_args(argv)
    workloads = sorted(WORKLOADS, key=lambda n: n not in FIRST)
    workloads = workloads[:1] if options.dry else workloads
    with tempfile.TemporaryDirectory() as folder:
        chosen = stages(Path(folder), options.dry, workloads)
        if options.only:
            chosen = [s for s in chosen if s.name.startswith(tuple(options.only))]
        if not chosen:
            parser.error(f"--only {options.only}: there is no such stage")
        result = run(
            chosen,
            options.out.resolve(),
            options.dry,
            options.commit,
            options.budget,
        )
    wrong = [n for n, s in result["stages"].items() if s["status"] != "ok"]
    print(f"wrote {options.out}" + (f"; not ok: {', '.join(wrong)}" if wrong else ""))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
