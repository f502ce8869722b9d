"""Backends of the native engine, and the fixture that runs a module's tests on each.

A module with ``pytestmark = on_every_backend`` (and the fixture imported by conftest)
goes through those of `EVERY` that this build has; test_backends.py says why others are
missing. Tests keep their tensors on the CPU: an engine on a GPU is wrapped, so that
what it is given moves there, and what it gives moves back.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmaml import _native
from fastmaml.engines.placement import missing

NAMES = ["cpu", "cpu_lockstep", "cuda_emulated", "cuda"]
# cpu_lockstep gives the bits of cpu, in all calls: test_native_lockstep.py.
EVERY = ["cpu", "cuda_emulated", "cuda"]
ONLY = os.environ.get("FASTMAML_TEST_BACKENDS", "").split()  # all, if there are none
# Problems that take seconds a pass in emulation, or minutes under a sanitizer.
SLOW = (
    "mini-imagenet-conv",
    "conv-32to64-k3x3-s1x1-p2x2-no-bias",
    "conv-64to65-k3x3-s1x1-p1x1",
)
on_every_backend = pytest.mark.usefixtures("backend")
_current = "cpu"


def why_not(name: str) -> str | None:
    """Why a backend can't run here, or ``None``."""
    reason = missing(name)
    if reason is None and name == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return reason


def usable(names: list[str] = EVERY) -> list[Any]:
    """Parameters for pytest: the names that can run here.

    If none can, all of them are there, marked to skip with the reason.
    FASTMAML_TEST_BACKENDS, names between spaces, leaves the others out.
    """
    names = [n for n in names if not ONLY or n in ONLY]
    reasons = {n: why_not(n) for n in names}
    if None in reasons.values():
        return [pytest.param(n) for n, reason in reasons.items() if reason is None]
    return [
        pytest.param(n, marks=pytest.mark.skip(reason=str(reasons[n]))) for n in names
    ]


@pytest.fixture(scope="module", params=usable())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes `current` each of the backends in turn."""
    yield from turn_of(request.param)


def turn_of(name: str) -> Iterator[str]:
    """Makes a backend `current`, for a module's own fixture."""
    global _current
    _current = name
    yield _current
    _current = "cpu"


def current() -> str:
    """The backend whose turn it is; ``cpu`` outside of `on_every_backend`."""
    return _current


def cpu_alone() -> None:
    """Skips what is about the CPU's threads, instruction sets or chunks."""
    if _current != "cpu":
        pytest.skip("about the CPU's own way to run tasks")


def quick_alone(problem: str) -> None:
    """Skips one of `SLOW` in emulation, where tests of single passes must suffice."""
    if _current == "cuda_emulated" and problem in SLOW:
        pytest.skip("too slow in emulation, whose single passes are tested")


def device_of(name: str) -> str:
    return "cuda" if name == "cuda" else "cpu"


def recorded_kernels() -> list[str]:
    """Ends ``core.begin_recording(run=True)``: the kernels that ran since, in order."""
    _, launches = _native.core().end_recording()
    return [kernel.partition("(")[0] for _, kernel, *_ in launches]


def placed(model: nn.Module, name: str) -> nn.Module:
    """The model where a backend takes it: itself, or a copy on the GPU."""
    device = device_of(name)
    return model if device == "cpu" else copy.deepcopy(model).to(device)


class Elsewhere:
    """An engine on a device, for callers that have everything on the CPU."""

    def __init__(self, engine: Any, device: str) -> None:
        self._engine, self._device = engine, device

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            moved = moved_to(arguments, self._device)
            return moved_to(found(*moved, **moved_to(options, self._device)), "cpu")

        return call


def moved_to(value: Any, device: str) -> Any:
    """A value with every tensor in it on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {n: moved_to(v, device) for n, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(moved_to(v, device) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        kept = {n: moved_to(getattr(value, n), device) for n in names}
        return dataclasses.replace(value, **kept)
    return value
