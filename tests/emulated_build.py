"""Programs of emulated CUDA kernels: drivers of tests/emulation/, kernels as C++."""

from __future__ import annotations

import ctypes
import fcntl
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def compile_driver(
    name: str, kernels: Iterable[Path], folder: Path, *flags: str, source: Path
) -> ctypes.CDLL:
    """Compiles kernels and the driver tests/emulation/``name``.cpp, two at a time.

    Whoever comes first to a folder compiles; the others, also processes, wait for that
    and load the same. Drivers in one folder share the objects of the emulation.
    """
    folder = folder / "-".join(("built", *flags)).replace("/", "_")
    library = folder / f"{name}.so"
    with alone(folder):
        if not library.exists():
            _compile(name, kernels, library, *flags, source=source)
    return ctypes.CDLL(str(library))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps all others out of a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(
    name: str, kernels: Iterable[Path], library: Path, *flags: str, source: Path
) -> None:
    sources = [
        *kernels,
        *(source / "cuda" / f"{n}.cpp" for n in ("host_emulation", "fiber", "machine")),
        *(source / "program").glob("*.cpp"),
        ROOT / "tests" / "emulation" / f"{name}.cpp",
    ]

    def compile_one(path: Path) -> Path:
        target = library.parent / f"{path.parent.name}_{path.stem}.o"
        if target.exists():
            return target
        command = ["g++", "-std=c++17", "-O1", "-fPIC", "-Wno-psabi", *flags]
        command += ["-Wno-unknown-pragmas", f"-I{source}", "-x", "c++", "-c", str(path)]
        subprocess.run([*command, "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    command = ["g++", "-shared", *flags, *map(str, objects), "-o", str(library)]
    subprocess.run(command, check=True)
