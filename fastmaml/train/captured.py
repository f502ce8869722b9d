"""A whole meta-step as one CUDA graph: the kernels of small networks outlast launching.

Meta-gradient and outer step are captured once, on buffers that stay where they are; a
step then copies its tasks there and replays. What a graph has baked in must not change:
shapes, settings, the tensors of model and optimizer. The learning rate may: it is read
from the device.

On the CPU nothing is captured: the same function runs again on the same buffers, which
is how everything but the capture itself is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastmaml.learners.details import MetaLossDetails
from fastmaml.optim.base import OneCall
from fastmaml.tasks.batch import TaskBatch

_WARM_UP = 3
_PARTS = ("support_x", "support_y", "query_x", "query_y")


class CapturedStep:
    """One meta-step, ``learner.backward(tasks)`` and ``optimizer.step()``, replayed.

    Building it runs some steps, which need memory and set up state, and undoes them.

    Args:
        learner: on the native engine.
        optimizer: of `fastmaml.optim`, over the learner's parameters.
        tasks: like all that will follow: shapes, dtypes, device.

    Raises:
        TypeError: the optimizer is not one of `fastmaml.optim`, whose steps can be
            captured and read the learning rate from the device.
        ValueError: the learner is not on the native engine, SGD with dampening has
            taken no step yet, or a batch differs from the one it was built with.
    """

    def __init__(self, learner: Any, optimizer: Optimizer, tasks: TaskBatch) -> None:
        if not isinstance(optimizer, OneCall):
            raise TypeError(
                "optimizer: expected one of fastmaml.optim, got "
                f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            )
        if learner.report.engine != "native":
            raise ValueError(
                f"learner: expected one on the native engine, got {learner.report}"
            )
        if _begins_otherwise(optimizer):
            raise ValueError(
                "optimizer: SGD with dampening begins its buffer as the gradient; a "
                "captured step would not. Take one step before capturing"
            )
        self._learner, self._optimizer = learner, optimizer
        self._tasks = TaskBatch(*(getattr(tasks, name).clone() for name in _PARTS))
        self._device = tasks.support_x.device
        self._rates = [
            torch.zeros((), dtype=torch.float64, device=self._device)
            for _ in optimizer.param_groups
        ]
        self._set_rates()
        optimizer._rates_there = self._rates
        self._replay = self._captured()
        details = learner.last
        self._metrics, self._classes = details._metrics, details._accuracy
        # whatever the graph writes must live as long as it
        self._kept = [learner._engine._workspace, *(p.grad for p in _params(optimizer))]

    def __call__(self, tasks: TaskBatch) -> Tensor:
        """Runs the step on these tasks.

        Returns:
            [] the meta-loss before the step. The next step overwrites it, as it does
            what ``learner.last`` refers to.
        """
        for name in _PARTS:
            static, new = getattr(self._tasks, name), getattr(tasks, name)
            if (new.shape, new.dtype) != (static.shape, static.dtype):
                raise ValueError(
                    f"{name}: expected {static.dtype} {list(static.shape)} as when the "
                    f"step was captured, got {new.dtype} {list(new.shape)}; capture "
                    "another step for such tasks"
                )
            static.copy_(new, non_blocking=True)
        self._set_rates()
        self._replay()
        if self._device.type == "cuda":
            self._learner.last = MetaLossDetails.lazily(
                float("nan"),
                self._loss.dtype,
                self._classes,
                self._tasks.tasks,
                self._metrics,
                self._loss,
            )
        return self._loss

    def _step(self) -> None:
        self._loss = self._learner.backward(self._tasks, accumulate=False)
        self._optimizer.step()

    def _set_rates(self) -> None:
        groups = self._optimizer.param_groups
        for there, group in zip(self._rates, groups, strict=True):
            there.fill_(float(group["lr"]))

    def _captured(self) -> Callable[[], None]:
        """Runs the step until nothing new is allocated, undoes that, captures it."""
        before = _Snapshot(self._optimizer)
        if self._device.type != "cuda":
            for _ in range(_WARM_UP):
                self._step()
            before.restore()
            return self._step
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._step()
            before.restore()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # on the same stream, so that the engine keeps its workspace
        with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=side):
            self._step()
        return graph.replay


class _Snapshot:
    """Values of parameters and optimizer state, to be put back in place."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._params = [(p, p.detach().clone()) for p in _params(optimizer)]
        self._state = {
            p: {n: v.clone() for n, v in entry.items() if isinstance(v, Tensor)}
            for p, entry in optimizer.state.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        """State that was made since becomes zero, which is where it starts."""
        for p, value in self._params:
            p.copy_(value)
        for p, entry in self._optimizer.state.items():
            kept = self._state.get(p, {})
            for name, tensor in entry.items():
                if not isinstance(tensor, Tensor):
                    continue
                if name in kept:
                    tensor.copy_(kept[name])
                else:
                    tensor.zero_()


def _begins_otherwise(optimizer: Optimizer) -> bool:
    """Whether the first step of a parameter is not that from a state of zeros."""
    return any(
        group.get("momentum")
        and group.get("dampening")
        and optimizer.state.get(p, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for p in group["params"]
    )


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
