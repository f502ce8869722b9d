"""Calls of the extension, and the workspace that they share.

The workspace is a torch tensor, kept between calls and grown when a call asks for more.
This is the inside of `NativeEngine`, in a file of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml import _native
from fastmaml.engines.placement import Placement


class Calls:
    """Runs calls one at a time, where the placement says."""

    _core: Any
    _device: torch.device
    _lock: threading.Lock
    _place: Placement
    _plan: Any
    _stream: int
    _workspace: Tensor

    def _run(
        self, name: str, program: Any, *arguments: Any, adapted: Sequence[bool] = ()
    ) -> Any:
        """Calls the extension, with a larger workspace if it asks for one."""
        call = getattr(self._core, name)
        with self._lock, self._place.guard():
            arguments = (self._place.of(program, adapted), program, *arguments)
            space = self._space(self._place.stream())
            plan = call(*arguments, (_native.own_address(space), space.numel()))
            # again, since the number of threads may have grown in between
            while plan.bytes > space.numel():
                space = self._larger(plan.bytes)
                plan = call(*arguments, (_native.own_address(space), space.numel()))
            self._plan = plan
        return plan

    def _run_prepared(
        self, call: Any, places: list[int], support_last: bool, query_last: bool
    ) -> Any:
        """As `_run`, for a prepared call; the caller holds the lock."""
        lasts = support_last, query_last
        space = self._workspace
        found = call.run(places, *lasts, _native.own_address(space), space.numel())
        while found is None:
            space = self._larger(call.plan.bytes)
            found = call.run(places, *lasts, _native.own_address(space), space.numel())
        self._plan = call
        return found

    def _launch_prepared(
        self,
        call: Any,
        places: list[int],
        support_last: bool,
        query_last: bool,
        metrics: Tensor,
    ) -> None:
        """As `_run_prepared`, where results are not there yet when a call returns."""
        lasts = support_last, query_last
        with self._place.guard():
            stream = self._place.stream()
            space = self._space(stream)
            behind = stream, _native.own_address(metrics)
            while not call.launch(
                places, *lasts, _native.own_address(space), space.numel(), *behind
            ):
                space = self._larger(call.plan.bytes)
        self._plan = call

    def _space(self, stream: int) -> Tensor:
        """The workspace: a new one for another stream, which would not wait."""
        if stream != self._stream:
            self._workspace, self._stream = self._workspace[:0].clone(), stream
        return self._workspace

    def _larger(self, size: int) -> Tensor:
        self._workspace = space = self._empty((size,), torch.uint8)
        if self._device.type == "cpu":
            self._core.wish_for_huge_pages(_native.own_address(space), size)
        return space

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)
