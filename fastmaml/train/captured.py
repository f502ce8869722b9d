"""A whole meta-step as one CUDA graph: the kernels of small networks outlast launching.

Sampling, meta-gradient and outer step are captured once, on buffers that stay where
they are, and replayed. What a graph has baked in must not change: shapes, the tensors
of model and optimizer, the optimizer's settings. The learning rate may: it is read from
the device. So may the learner's settings and engine, which are captured anew then.

On the CPU nothing is captured: the same function runs again on the same buffers, which
is how everything but the capture itself is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        tasks: like all that will follow: shapes, dtypes, device; or what draws the next
            tasks and can be captured too.
        clip_gradient: each element of the meta-gradient is held within this, ±.
        finish: is given the loss behind the optimizer's step, captured too.
        state: tensors that drawing and finishing change, which building puts back.

    Attributes:
        device: where it runs.

    Raises:
        TypeError: the optimizer is not one of `fastmaml.optim`, whose steps can be
            captured and read the learning rate from the device.
        ValueError: the learner is not on the native engine, SGD with dampening has
            taken no step yet, or a batch differs from the one it was built with.
    """

    def __init__(
        self,
        learner: Any,
        optimizer: Optimizer,
        tasks: TaskBatch | Callable[[], TaskBatch],
        *,
        clip_gradient: float | None = None,
        finish: Callable[[Tensor], None] | None = None,
        state: Sequence[Tensor] = (),
    ) -> None:
        if not isinstance(optimizer, OneCall):
            raise TypeError(
                "optimizer: expected one of fastmaml.optim, got "
                f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            )
        if learner.report.engine != "native":
            raise ValueError(
                f"learner: expected one on the native engine, got {learner.report}"
            )
        if begins_otherwise(optimizer):
            raise ValueError(
                "optimizer: SGD with dampening begins its buffer as the gradient; a "
                "captured step would not. Take one step before capturing"
            )
        self._learner, self._optimizer = learner, optimizer
        self._parameters = _params(optimizer)
        self.device = self._parameters[0].device
        self._clip, self._finish, self._state = clip_gradient, finish, [*state]
        self._static: TaskBatch | None = None
        if isinstance(tasks, TaskBatch):
            static = TaskBatch(*(getattr(tasks, name).clone() for name in _PARTS))
            self._static, self._draw = static, lambda: static
        else:
            self._draw = tasks
        self._rates = [
            torch.zeros((), dtype=torch.float64, device=self.device)
            for _ in optimizer.param_groups
        ]
        self._rates_set: list[float | None] = [None for _ in self._rates]
        self._set_rates()
        optimizer._rates_there = self._rates
        self._capture()

    def __call__(self, tasks: TaskBatch | None = None) -> Tensor:
        """Runs the step on these tasks, or on those that it draws.

        Returns:
            [] the meta-loss before the step. The next step overwrites it, as it does
            what ``learner.last`` refers to.
        """
        if tasks is not None:
            self._take(tasks)
        self._set_rates()
        learner = self._learner
        learner._refresh()
        if (
            learner._engine is not self._engine
            or learner.settings is not self._settings
        ):
            self._capture()
        self._replay()
        if self.device.type == "cuda":
            learner.last = MetaLossDetails.lazily(
                float("nan"),
                self._loss.dtype,
                self._classes,
                self._tasks,
                self._metrics,
                self._loss,
            )
        return self._loss

    def baked(self) -> bool:
        """Whether the optimizer's settings are still those that were captured."""
        return _settings(self._optimizer) == self._options

    def close(self) -> None:
        """Lets the optimizer's own steps read the learning rate of its groups again."""
        self._optimizer._rates_there = None

    def _take(self, tasks: TaskBatch) -> None:
        """Copies tasks to where the step reads them."""
        assert self._static is not None
        for name in _PARTS:
            static, new = getattr(self._static, name), getattr(tasks, name)
            if (new.shape, new.dtype) != (static.shape, static.dtype):
                raise ValueError(
                    f"{name}: expected {static.dtype} {list(static.shape)} as when the "
                    f"step was captured, got {new.dtype} {list(new.shape)}; capture "
                    "another step for such tasks"
                )
            static.copy_(new, non_blocking=True)

    def _step(self) -> None:
        tasks = self._draw()
        self._tasks = tasks.tasks
        self._loss = self._learner.backward(tasks, accumulate=False)
        if self._clip is not None:
            torch.nn.utils.clip_grad_value_(self._parameters, self._clip)
        self._optimizer.step()
        if self._finish is not None:
            self._finish(self._loss)

    def _set_rates(self) -> None:
        for i, group in enumerate(self._optimizer.param_groups):
            rate = float(group["lr"])
            if rate != self._rates_set[i]:
                self._rates[i].fill_(rate)
                self._rates_set[i] = rate

    def _capture(self) -> None:
        self._options = _settings(self._optimizer)
        self._replay = self._captured()
        learner = self._learner
        self._engine, self._settings = learner._engine, learner.settings
        details = learner.last
        self._metrics, self._classes = details._metrics, details._accuracy
        # whatever the graph writes must live as long as it
        self._kept = [
            learner._engine._workspace,
            *(p.grad for p in self._parameters),
            *self._optimizer._prepared,
        ]

    def _captured(self) -> Callable[[], None]:
        """Runs the step until nothing new is allocated, undoes that, captures it."""
        before = _Snapshot(self._optimizer, self._state)
        if self.device.type != "cuda":
            for _ in range(_WARM_UP):
                self._step()
            before.restore()
            return self._step
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._step()
            before.restore()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # on the same stream, so that the engine keeps its workspace
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=side):
            self._step()
        return graph.replay


class _Snapshot:
    """Values of parameters, optimizer state and more, to be put back in place."""

    def __init__(self, optimizer: Optimizer, more: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        tensors = [*_params(optimizer), *more]
        self._tensors = [(p, p.detach().clone()) for p in tensors]
        self._state = {
            p: {n: v.clone() for n, v in entry.items() if isinstance(v, Tensor)}
            for p, entry in optimizer.state.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        """State that was made since becomes zero, which is where it starts."""
        for p, value in self._tensors:
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


def begins_otherwise(optimizer: Optimizer) -> bool:
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


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What a step bakes in of every group; schedules keep notes beside it."""
    beside = ("params", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
    return [
        {name: value for name, value in group.items() if name not in beside}
        for group in optimizer.param_groups
    ]
