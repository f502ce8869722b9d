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
        "devices": _devices(native["available"]),
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


def _devices(native: bool) -> dict[str, str]:
    cuda = "functional engine" if torch.cuda.is_available() else "not visible to torch"
    return {
        "cpu": "native and functional engine" if native else "functional engine"
    } | {"cuda": cuda}


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
    missing["native engine on cuda"] = (
        "this version has no CUDA backend; models on a GPU run on the functional engine"
    )
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
