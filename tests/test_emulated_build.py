"""Drivers of emulated kernels are compiled once, whoever asks first."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest
from emulated_build import ROOT, alone, compile_driver

SOURCE = ROOT / "csrc"
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def _count(folder: Path) -> None:
    """Reads, waits and writes, which goes wrong where two do it at once."""
    number = folder / "number"
    for _ in range(50):
        with alone(folder):
            before = int(number.read_text()) if number.exists() else 0
            number.write_text(str(before + 1))


@forks
def test_a_folder_is_one_processs_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count, args=(tmp_path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "number").read_text() == "200"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_driver_is_compiled_once(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = [SOURCE / "cuda" / "task_resident.cu"]
    compile_driver("resident", kernels, compiled, source=SOURCE)
    monkeypatch.setenv("PATH", "")  # so that nothing can be compiled
    compile_driver("resident", kernels, compiled, source=SOURCE)
