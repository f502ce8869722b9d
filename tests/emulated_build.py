"""Programs of emulated CUDA kernels: drivers of tests/emulation/, kernels as C++."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def compile_driver(
    name: str, kernels: Iterable[Path], folder: Path, *flags: str, source: Path
) -> ctypes.CDLL:
    """Compiles kernels and the driver tests/emulation/``name``.cpp, two at a time."""
    sources = [
        *kernels,
        *(source / "cuda" / f"{n}.cpp" for n in ("host_emulation", "fiber", "machine")),
        *(source / "program").glob("*.cpp"),
        ROOT / "tests" / "emulation" / f"{name}.cpp",
    ]

    def compile_one(path: Path) -> Path:
        target = folder / f"{path.parent.name}_{path.stem}.o"
        command = ["g++", "-std=c++17", "-O1", "-fPIC", "-Wno-psabi", *flags]
        command += ["-Wno-unknown-pragmas", f"-I{source}", "-x", "c++", "-c", str(path)]
        subprocess.run([*command, "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / f"{name}.so"
    command = ["g++", "-shared", *flags, *map(str, objects), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))
