"""Where and on what a result was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from fastmaml import info

SHOWN_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
SHOWN_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "FASTMAML_CORE_PATH",
)


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> dict[str, Any]:
    """CPU model and instruction sets, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"cpu": platform.processor() or platform.machine(), "flags": []}
    first = text.split("\n\n")[0].splitlines()
    fields = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in first)}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.machine()),
        "flags": [flag for flag in SHOWN_FLAGS if flag in flags],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def without_paths(text: str) -> str:
    """Replaces absolute paths by their last part: results travel, folders don't."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+([^\s/:'\"]*)", r"\1", text)


def _native() -> dict[str, Any]:
    """What the extension says of its build, in plain values without paths."""
    native = info.collect()["native"]
    return {
        k: v if isinstance(v, bool) else without_paths(str(v))
        for k, v in native.items()
    }


def gpu() -> dict[str, Any]:
    """The GPU as torch and its driver tell; empty without one."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        driver = (done.stdout.splitlines() or ["unknown"])[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = "unknown"
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "driver": driver,
        "cuda": torch.version.cuda,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }


def collect(device: str = "cpu") -> dict[str, Any]:
    """Gathers date, commit, machine, versions and environment, ready for JSON."""
    packages = ("fastmaml", "torch", "jax", "jaxlib", "numpy")
    versions = {name: _version(name) for name in packages}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": device,
        **({} if device == "cpu" else {"gpu": gpu()}),
        "machine": {
            **_cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **versions},
        "native": _native(),
        "environment": {
            name: os.environ[name] for name in SHOWN_VARIABLES if name in os.environ
        },
    }
