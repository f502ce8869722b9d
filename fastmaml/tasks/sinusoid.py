"""Few-shot regression on sine waves (Finn et al. 2017, section 5.1).

A task is a wave ``y = A sin(x - phase)``. One call of the random generator serves a
whole meta-batch: T amplitudes, T phases, then the support and the query inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmaml.tasks.batch import TaskBatch
from fastmaml.tasks.sampler import TaskSampler, check_count


class Sinusoid(TaskSampler):
    """Tasks of regressing a sine wave of random amplitude and phase.

    Args:
        support: support samples of a task, S.
        queries: query samples of a task, Q.
        seed: start of the stream.
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
        self._cached_bounds: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def draw(self, tasks: int, generator: torch.Generator) -> TaskBatch:
        """Returns ``tasks`` tasks made of random numbers of ``generator`` alone."""
        return self._draw(tasks, generator)[0]

    def sample_with_parameters(self, tasks: int) -> tuple[TaskBatch, Tensor, Tensor]:
        """Returns the next tasks of the stream with what defines each wave.

        Returns:
            The batch, the amplitudes [T] and the phases [T] in radians.
        """
        return self._draw(check_count("tasks", tasks), self._generator)

    def fixed_with_parameters(
        self, tasks: int, seed: int = 0
    ) -> tuple[TaskBatch, Tensor, Tensor]:
        """Returns the tasks of ``fixed`` with their amplitudes and phases [T]."""
        return self._draw(check_count("tasks", tasks), self._fixed_generator(seed))

    def _draw(
        self, tasks: int, generator: torch.Generator
    ) -> tuple[TaskBatch, Tensor, Tensor]:
        sizes = (tasks, tasks, tasks * self.support, tasks * self.queries)
        low, width = self._bounds(sizes)
        numbers = torch.rand(
            sum(sizes), generator=generator, device=self.device, dtype=self.dtype
        )
        parts = torch.addcmul(low, numbers, width).split(sizes)
        amplitude, phase = parts[0].view(tasks, 1, 1), parts[1].view(tasks, 1, 1)
        support_x, query_x = parts[2].view(tasks, -1, 1), parts[3].view(tasks, -1, 1)
        batch = TaskBatch(
            support_x,
            torch.sub(support_x, phase).sin_().mul_(amplitude),
            query_x,
            torch.sub(query_x, phase).sin_().mul_(amplitude),
        )
        return batch, parts[0], parts[1]

    def _bounds(self, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Low end and width of the range of every number of a meta-batch."""
        bounds = self._cached_bounds.get(sizes)
        if bounds is None:
            ranges = (self.amplitude, self.phase, self.x, self.x)
            pairs = torch.tensor(ranges, dtype=torch.float64)
            pairs = pairs.repeat_interleave(torch.tensor(sizes), dim=0)
            low, high = pairs.to(self.device).unbind(1)
            bounds = low.to(self.dtype), (high - low).to(self.dtype)
            self._cached_bounds = {sizes: bounds}
        return bounds


def _check_range(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = (float(bound) for bound in bounds)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name} must be finite (low, high), got {bounds!r}")
    return low, high
