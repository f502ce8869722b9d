"""Which backends the tests go through, and why some are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import backends
import pytest
from problems import BY_NAME


@pytest.mark.parametrize("name", backends.NAMES)
def test_backend_is_tested(name):
    if reason := backends.why_not(name):
        pytest.skip(reason)
    assert [p.values for p in backends.usable([name])] == [(name,)] or backends.ONLY


def test_backends_can_be_chosen():
    code = "import backends as b; print(*[p.values[0] for p in b.usable(b.NAMES)])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "FASTMAML_TEST_BACKENDS": "cpu_lockstep cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["cpu", "cpu_lockstep"]


def test_those_that_cannot_run_are_left_out(monkeypatch):
    missing = {"cuda": "no GPU", "cuda_emulated": "not built"}
    monkeypatch.setattr(backends, "why_not", missing.get)
    monkeypatch.setattr(backends, "ONLY", [])
    assert [p.values for p in backends.usable()] == [("cpu",)]


def test_where_no_backend_can_run_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name: f"no {name} here")
    monkeypatch.setattr(backends, "ONLY", [])
    (found,) = backends.usable(["cuda"])
    assert found.values == ("cuda",)
    assert found.marks[0].kwargs == {"reason": "no cuda here"}


def test_slow_problems_are_left_to_single_passes_in_emulation_alone(monkeypatch):
    assert set(backends.SLOW) <= set(BY_NAME)
    backends.quick_alone(backends.SLOW[0])
    monkeypatch.setattr(backends, "_current", "cuda_emulated")
    backends.quick_alone("linear-9to15")
    with pytest.raises(pytest.skip.Exception):
        backends.quick_alone(backends.SLOW[0])
