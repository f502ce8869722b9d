"""The portable kernels on another processor: AArch64 with NEON, under QEMU.

One small program writes meta-gradients; built for this processor and for AArch64, it
must write the same numbers up to rounding. Needs a cross compiler and QEMU's user
emulation (Debian: g++-aarch64-linux-gnu, qemu-user); skipped where they are missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from close import assert_close

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "portable" / "meta_gradients.cpp"
FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def _written(compiler: str, folder: Path, *run: str) -> dict[str, torch.Tensor]:
    """Builds engine and program, portable kernels alone; what the program prints."""
    folder.mkdir()
    sources = [PROGRAM, *(ROOT / "csrc" / "cpu").glob("[!k]*.cpp")]
    sources += [
        *(ROOT / "csrc").glob("program/*.cpp"),
        *(ROOT / "csrc").glob("meta/*.cpp"),
    ]
    kernels = ROOT / "csrc" / "cpu" / "kernels_isa.cpp"
    common = [compiler, *FLAGS, "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    objects = []
    for scalar, dtype in (("float", "f32"), ("double", "f64")):
        objects.append(folder / f"{dtype}.o")
        names = [f"-DFM_SCALAR={scalar}", f"-DFM_DTYPE_NAME={dtype}"]
        names.append("-DFM_ISA_NAME=baseline")
        subprocess.run([*common, *names, "-c", kernels, "-o", objects[-1]], check=True)
    program = folder / "meta_gradients"
    subprocess.run([*common, "-static", *sources, *objects, "-o", program], check=True)
    written = folder / "written"
    subprocess.run([*run, program, written], check=True, timeout=300)
    values: dict[str, list[float]] = {}
    for line in written.read_text().splitlines():
        name, value = re.fullmatch(r"(.*) (\S+)", line).groups()  # type: ignore[union-attr]
        values.setdefault(name, []).append(float(value))
    return {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}


@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR) and shutil.which("g++")),
    reason=f"needs g++, {CROSS} and {EMULATOR}",
)
def test_aarch64_computes_the_same_meta_gradients(tmp_path: Path) -> None:
    here = _written("g++", tmp_path / "here")
    there = _written(CROSS, tmp_path / "there", EMULATOR)
    assert here.keys() == there.keys() and len(here) == 8
    for name, want in here.items():
        assert want.isfinite().all() and want.abs().max() > 1e-3
        ledger = "float64 chain" if "float64" in name else "float32 chain"
        assert_close(there[name], want, ledger, name)
