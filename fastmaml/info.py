"""What is installed, what was built, what runs where, and why anything is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fastmaml import _native

# Instruction set -> what torch calls processors that have it.
HAVE = {"avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}


def collect() -> dict[str, Any]:
    """Gathers the diagnosis of this installation; never fails.

    Returns:
        Plain values, ready for JSON: ``version``, ``location``, ``system``,
        ``python``, ``packages`` (name -> version), ``native`` (``available`` and, if
        so, what the extension says of its own build, else ``reason``), ``devices``
        (name -> which engines serve it) and ``missing`` (what -> why).
    """
    native = _native_info()
    return {
        "version": _version("fastmaml") or "unknown (not installed)",
        "location": str(Path(__file__).parent),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "numpy")},
        "native": native,
        "devices": _devices(native),
        "missing": _missing(native),
    }


def render() -> str:
    """Returns the diagnosis as text, for ``fastmaml info``."""
    facts = collect()
    native = facts["native"]
    rows = {
        "fastmaml": f"{facts['version']} in {facts['location']}",
        "system": facts["system"],
        "python": facts["python"],
        **{name: version or "missing" for name, version in facts["packages"].items()},
        "native engine": "available" if native["available"] else "not available",
        **{f"  {key}": _flat(native[key]) for key in native if key not in _SHOWN},
        **{f"device {name}": served for name, served in facts["devices"].items()},
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    for what, why in facts["missing"].items():
        lines += ["", f"missing: {what}", *(f"  {line}" for line in why.splitlines())]
    return "\n".join(lines)


_SHOWN = ("available", "reason")


def _native_info() -> dict[str, Any]:
    reason = _native.unavailable()
    if reason is not None:
        return {"available": False, "reason": reason}
    built = _native.core().build_info()
    as_lists = {k: list(v) for k, v in built.items() if isinstance(v, tuple)}
    return {"available": True, **built, **as_lists}


def _devices(native: dict[str, Any]) -> dict[str, str]:
    both, functional = "native and functional engine", "functional engine"
    cuda = both if native.get("cuda_backend") == "cuda" else functional
    return {
        "cpu": both if native["available"] else functional,
        "cuda": cuda if torch.cuda.is_available() else "not visible to torch",
    }


def _no_native_cuda(native: dict[str, Any]) -> str | None:
    """Why the native engine doesn't run on GPUs, or ``None`` where it does."""
    if not native["available"]:
        return "needs the native engine, which is missing"
    kind = native.get("cuda_backend", "none")
    if kind == "cuda":
        seen = torch.cuda.is_available()
        return None if seen else f"built ({native['cuda']}), but torch sees no GPU"
    if kind == "cuda_emulated":
        why = "this build emulates it on the CPU, for tests"
    else:
        why = native.get("cuda", "none: an older build").removeprefix("none: ")
    return (
        f"{why}; models on a GPU run on the functional engine. With the CUDA toolkit "
        "12 or 13 here, rebuild with FASTMAML_CUDA=ON"
    )


def _missing(native: dict[str, Any]) -> dict[str, str]:
    missing = {}
    if not native["available"]:
        missing["native engine"] = native["reason"]
    elif platform.machine() in ("x86_64", "AMD64"):
        processor = torch.backends.cpu.get_cpu_capability()
        for isa in sorted(HAVE.keys() - set(native.get("isas", HAVE))):
            if processor in HAVE[isa]:
                missing[isa] = "left out of this build: rebuild with FASTMAML_ISA=all"
            else:
                missing[isa] = "this processor does not have it"
    if (why := _no_native_cuda(native)) is not None:
        missing["native engine on cuda"] = why
    if importlib.util.find_spec("jax") is None:
        missing["jax"] = 'not installed, the bench skips it: pip install ".[bench]"'
    return missing


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _flat(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)
