"""Where the native engine computes: a backend of the extension, a device, a stream.

The CPU's operations are done when they return, and read numbers where they are. On a
GPU everything is put into torch's current stream: nobody waits, and what operations
read (index tables, flags) is in the GPU's memory. `cpu_lockstep` and `cuda_emulated`
run on CPU tensors as a GPU would, for tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml import _native

PRECISIONS = ("float32", "tf32", "bfloat16")

# (backend, stream, precision, tables, adapted flags), as csrc/bind/backends.h
Place = tuple[int, int, int, int, int]


def missing(backend: str) -> str | None:
    """Why a backend can't be used, or ``None``."""
    reason = _native.unavailable()
    if reason is not None:
        return reason
    built = _native.core().backends()
    if backend in built:
        return None
    return (
        f"this build of fastmaml has no {backend} backend (it has {', '.join(built)})"
    )


def backend_for(device: torch.device) -> str:
    """The backend for tensors of a device."""
    return "cpu" if device.type == "cpu" else str(device.type)


class Placement:
    """A backend on a device.

    Args:
        backend: one of ``_core.backends()``.
        device: of all tensors that calls are given.
        precision: how tensor cores multiply float32: ``float32``, ``tf32`` or
            ``bfloat16``.

    Attributes:
        on_host: results are there when a call returns.
        lockstep: all tasks are in work at once.
        samples: makes tasks in its own memory.

    Raises:
        ValueError: if the backend was not built, or doesn't know the precision.
    """

    def __init__(
        self, backend: str, device: torch.device, precision: str = "float32"
    ) -> None:
        reason = missing(backend)
        if reason is not None:
            raise ValueError(reason)
        facts = _native.core().backends()[backend]
        if precision != "float32" and not facts["tensor_cores"]:
            raise ValueError(
                f"precision={precision!r}: the {backend} backend computes in float32 "
                "(or float64) alone; leave precision='float32', or use a GPU"
            )
        self.backend, self.device = backend, device
        self.on_host: bool = facts["host_memory"]
        self.lockstep: bool = facts["lockstep"]
        self.samples: bool = facts["samples"]
        self._kind: int = facts["kind"]
        self._precision = PRECISIONS.index(precision)
        self._cuda = device.type == "cuda"
        self._copies: dict[Any, Tensor] = {}
        self._plain: Place = (self._kind, 0, self._precision, 0, 0)

    def stream(self) -> int:
        """The handle of torch's current stream, 0 where there are none."""
        if not self._cuda:
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def guard(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the device the current one, which launches need."""
        return torch.cuda.device(self.device) if self._cuda else _NOTHING

    def of(self, program: Any, adapted: Sequence[bool] = ()) -> Place:
        """What a call is told.

        Args:
            program: compiled; its tables are copied once, so it must stay alive.
            adapted: flags of the program's parameters, if the call has rates.
        """
        if self.on_host:
            return self._plain
        tables = self._copy(("tables", id(program)), program.tables)
        flags = bytes(map(bool, adapted))
        there = self._copy(("adapted", flags), lambda: flags) if flags else 0
        return (self._kind, self.stream(), self._precision, tables, there)

    def launch(self) -> tuple[int, int]:
        """Where kernels that need no more than a stream are launched."""
        return self._kind, self.stream()

    def step(self, rate: Tensor | None = None) -> tuple[int, int, int]:
        """Where an optimizer's step runs.

        Args:
            rate: [] float64 on the device, read in place of the rate that the step
                is given.
        """
        there = 0 if rate is None else _native.own_address(rate)
        return self._kind, self.stream(), there

    def _copy(self, key: Any, content: Any) -> int:
        """The address of bytes in the device's memory, copied there once."""
        copy = self._copies.get(key)
        if copy is None:
            # never empty: an address of nothing would be 0
            host = torch.frombuffer(bytearray(content() + b"\0"), dtype=torch.uint8)
            copy = self._copies[key] = host.clone().to(self.device)
        return _native.own_address(copy)


_NOTHING = contextlib.nullcontext()


def check_device(device: str) -> None:
    """Refuses a device that torch can't use here.

    Raises:
        ValueError: naming it, with torch's reason.
    """
    try:
        torch.empty((), device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r}: torch can't use it: {reason}") from error
