"""Few-shot regression on sine waves (Finn et al. 2017, section 5.1).

A task is a wave ``y = A sin(x - phase)``. Its random words (`fastmaml.tasks.philox`)
are, in this order, A, phase, the x of its support samples, the x of its query samples:
each ``low + u (high - low)`` with u uniform in [0, 1).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmaml import _native
from fastmaml.tasks.batch import TaskBatch, batch_of
from fastmaml.tasks.device import DeviceStream
from fastmaml.tasks.philox import TaskStream, task_words, uniform
from fastmaml.tasks.sampler import TaskSampler, check_count, native_core

# quicker than making a tensor from its shape
_EMPTY_LIKE = torch.empty_like


class Sinusoid(TaskSampler):
    """Tasks of regressing a sine wave of random amplitude and phase.

    Args:
        support: support samples of a task, S.
        queries: query samples of a task, Q.
        seed: which stream, below 2^64.
        amplitude: range of A, uniform.
        phase: range of the phase in radians, uniform.
        x: range of the inputs, uniform.
        device: where batches are made.
        dtype: floating dtype of the batches.

    Raises:
        ValueError: a count is less than 1, or a range is not (low, high).

    Source:
        Section 5.1: A in [0.1, 5], phase in [0, pi], x in [-5, 5].
    """

    input_shape = (1,)
    outputs = 1

    def __init__(
        self,
        support: int = 10,
        queries: int = 10,
        *,
        seed: int = 0,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x: tuple[float, float] = (-5.0, 5.0),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(seed=seed, device=device, dtype=dtype)
        self.support = check_count("support", support)
        self.queries = check_count("queries", queries)
        self.amplitude = _check_range("amplitude", amplitude)
        self.phase = _check_range("phase", phase)
        self.x = _check_range("x", x)
        self._sizes = support, queries
        self._like: tuple[int, Tensor, Tensor] | None = None
        self._drawer = self._make_drawer()
        self._draw_by_kernels()

    def draw(self, tasks: int, stream: TaskStream) -> TaskBatch:
        """Returns the next ``tasks`` tasks of ``stream``."""
        if self._drawer is None and self._place is None:
            return self._restated(tasks, stream)[0]
        return self._drawn(tasks, stream, 0, 0)

    def sample_with_parameters(self, tasks: int) -> tuple[TaskBatch, Tensor, Tensor]:
        """Returns the next tasks of the stream with what defines each wave.

        Returns:
            The batch, the amplitudes [T] and the phases [T] in radians.
        """
        return self._draw(check_count("tasks", tasks), self._stream)

    def fixed_with_parameters(
        self, tasks: int, seed: int = 0
    ) -> tuple[TaskBatch, Tensor, Tensor]:
        """Returns the tasks of ``fixed`` with their amplitudes and phases [T]."""
        return self._draw(check_count("tasks", tasks), self._fixed_stream(seed))

    def _draw(self, tasks: int, stream: TaskStream) -> tuple[TaskBatch, Tensor, Tensor]:
        if self._drawer is None and self._place is None:
            return self._restated(tasks, stream)
        waves = torch.empty((2, tasks), dtype=self.dtype, device=self.device)
        amplitude, phase = waves
        places = _native.addresses((amplitude, phase))
        return self._drawn(tasks, stream, *places), amplitude, phase

    def _make_drawer(self) -> Any:
        if (core := native_core(self.device, self.dtype)) is None:
            return None
        single = self.dtype == torch.float32
        kind = core.SinusoidsFloat32 if single else core.SinusoidsFloat64
        return kind(*self._sizes, self.amplitude, self.phase, self.x)

    def _drawn(
        self, tasks: int, stream: TaskStream, amplitudes: int, phases: int
    ) -> TaskBatch:
        """By the extension, which also writes amplitudes and phases at addresses."""
        like = self._like
        if like is None or like[0] != tasks:
            samples, queries = self._sizes
            kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
            support = torch.empty((tasks, samples, 1), **kind)
            query = torch.empty((tasks, queries, 1), **kind)
            self._like = like = tasks, support, query
        _, support, query = like
        made = (
            _EMPTY_LIKE(support),
            _EMPTY_LIKE(support),
            _EMPTY_LIKE(query),
            _EMPTY_LIKE(query),
        )
        places = _native.addresses(made)
        if self._place is not None:
            self._launch(tasks, stream, (*places, amplitudes, phases))
            return batch_of(*made)
        first = stream.take(tasks)
        self._drawer.draw(stream.key, first, tasks, places, amplitudes, phases)
        return batch_of(*made)

    def _launch(self, tasks: int, stream: TaskStream, places: tuple[int, ...]) -> None:
        """By a kernel, for which nobody waits."""
        assert self._place is not None
        single = self.dtype == torch.float32
        core = _native.core()
        draw = (
            core.device_sinusoids_float32 if single else core.device_sinusoids_float64
        )
        ranges = self.amplitude, self.phase, self.x
        there = DeviceStream.of(stream, self.device)
        with self._place.guard():
            where = self._place.launch()
            draw(where, there.address(), tasks, self._sizes, ranges, places)
        if there is not stream:
            stream.take(tasks)

    def _restated(
        self, tasks: int, stream: TaskStream
    ) -> tuple[TaskBatch, Tensor, Tensor]:
        """The same tasks where the extension can't be used."""
        double = self.dtype == torch.float64
        key, first = stream.key, stream.take(tasks)
        count = 2 + self.support + self.queries
        high = task_words(key, first, tasks, count)
        low = task_words(key, first, tasks, count, plane=1) if double else None
        number = uniform(high, low)
        kind = number.dtype.type

        def spread(values: np.ndarray, bounds: tuple[float, float]) -> Tensor:
            numbers = kind(bounds[0]) + values * kind(bounds[1] - bounds[0])
            return torch.from_numpy(numbers)

        amplitude = spread(number[:, :1], self.amplitude).unsqueeze(2)
        phase = spread(number[:, 1:2], self.phase).unsqueeze(2)
        x = spread(number[:, 2:], self.x).unsqueeze(2)
        y = amplitude * torch.sin(x - phase)
        parts = [
            part.contiguous().to(self.device, self.dtype)
            for half in zip(
                x.split((self.support, self.queries), 1),
                y.split((self.support, self.queries), 1),
                strict=True,
            )
            for part in half
        ]
        waves = (w.view(-1).to(self.device, self.dtype) for w in (amplitude, phase))
        return (TaskBatch(*parts), *waves)  # type: ignore[return-value]


def _check_range(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = (float(bound) for bound in bounds)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name} must be finite (low, high), got {bounds!r}")
    return low, high
