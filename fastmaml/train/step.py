"""The meta-step of the training loop: read by the host, or left to a device.

On the CPU a step is a few calls, and its loss is looked at before the parameters move.
On a GPU the host only launches: a step is captured as a CUDA graph where it can be
(`fastmaml.train.captured`), sums of losses stay on the device until a row of metrics is
due, and a step says what was not captured, and why. `cpu_lockstep` and `cuda_emulated`
take the GPU's way without a graph, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from fastmaml.optim.base import OneCall
from fastmaml.tasks.batch import TaskBatch
from fastmaml.tasks.device import DeviceStream
from fastmaml.tasks.sampler import TaskSampler
from fastmaml.train.captured import CapturedStep, begins_otherwise
from fastmaml.train.watch import LossWatch


@dataclass
class Parts:
    """What a step is made of.

    Attributes:
        learner: gives the meta-gradient.
        tasks: draws the meta-batches.
        meta_batch: tasks of each.
        optimizer: over the learner's parameters.
        clip_gradient: bound of the gradient's elements, or ``None``.
        watch: is told every loss.
        say: tells the user a line.
    """

    learner: Any
    tasks: TaskSampler
    meta_batch: int
    optimizer: Optimizer
    clip_gradient: float | None
    watch: LossWatch
    say: Callable[[str], None]

    @property
    def parameters(self) -> list[Tensor]:
        """All that the optimizer updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class HostStep:
    """Samples, computes the meta-gradient, looks at the loss, updates."""

    how = "one after the other, each loss read"

    def __init__(self, parts: Parts) -> None:
        self._sample, self._meta_batch = parts.tasks.sample, parts.meta_batch
        self._learner, self._backward = parts.learner, parts.learner.backward
        self._add, self._step = parts.watch.add, parts.optimizer.step
        self._clip, self._parameters = parts.clip_gradient, parts.parameters

    def __call__(self) -> bool:
        """Runs it; whether training may go on, else the parameters stay."""
        loss = self._backward(self._sample(self._meta_batch), accumulate=False)
        if not self._add(loss, self._learner):
            return False
        if self._clip is not None:
            torch.nn.utils.clip_grad_value_(self._parameters, self._clip)
        self._step()
        return True

    def close(self) -> None:
        """Leaves nothing behind."""


class DeviceStep:
    """The same without waiting for a device; captured where that can be.

    Attributes:
        how: which parts of a step are captured, or why none is.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        parts.watch.leave_on(parts.parameters[0].device)
        self._captured: CapturedStep | None = None
        self._draws = _draws_there(parts)
        self._reason = obstacle(parts.learner, parts.optimizer)
        self._tell()

    def __call__(self) -> bool:
        """Runs it; training may go on as far as is known."""
        watch = self._parts.watch
        if self._captured is not None and not self._captured.baked():
            self.close()
            self._reason = "the optimizer's settings change from step to step"
            self._tell()
        if self._reason is not None or begins_otherwise(self._parts.optimizer):
            self._eagerly()
        elif self._draws:
            if self._captured is None:
                self._captured = self._capture(self._sample)
            self._captured()
        else:
            tasks = self._sample()
            if self._captured is None:
                self._captured = self._capture(tasks)
            self._captured(tasks)
        watch.count += 1
        return True

    def close(self) -> None:
        """Gives the optimizer its learning rates back."""
        if self._captured is not None:
            self._captured.close()
            self._captured = None

    def _sample(self) -> TaskBatch:
        return self._parts.tasks.sample(self._parts.meta_batch)

    def _gather(self, loss: Tensor) -> None:
        self._parts.watch.gather(loss, self._parts.learner)

    def _capture(self, tasks: TaskBatch | Callable[[], TaskBatch]) -> CapturedStep:
        parts = self._parts
        state = [parts.watch.sums]
        if self._draws and isinstance(parts.tasks._stream, DeviceStream):
            state.append(parts.tasks._stream.place)
        return CapturedStep(
            parts.learner,
            parts.optimizer,
            tasks,
            clip_gradient=parts.clip_gradient,
            finish=self._gather,
            state=state,
        )

    def _eagerly(self) -> None:
        parts = self._parts
        loss = parts.learner.backward(self._sample(), accumulate=False)
        if parts.clip_gradient is not None:
            torch.nn.utils.clip_grad_value_(parts.parameters, parts.clip_gradient)
        parts.optimizer.step()
        self._gather(loss)

    def _tell(self) -> None:
        parts = self._parts
        if self._reason is not None:
            self.how = f"kernel by kernel: {self._reason}"
        else:
            self.how = "a CUDA graph of "
            if parts.parameters[0].device.type != "cuda":
                self.how = "kernel by kernel, as there are no graphs here: "
            name = type(parts.optimizer).__name__
            sampler = type(parts.tasks).__name__
            if self._draws:
                self.how += f"{sampler}, meta-gradient and {name}"
            else:
                self.how += f"meta-gradient and {name}; {sampler} draws outside of it"
        parts.say(f"meta-steps: {self.how}")


def make_step(parts: Parts) -> HostStep | DeviceStep:
    """The step for where the learner computes."""
    place = getattr(getattr(parts.learner, "_engine", None), "_place", None)
    there = place is not None and not place.on_host
    if there or parts.parameters[0].device.type == "cuda":
        return DeviceStep(parts)
    return HostStep(parts)


def obstacle(learner: Any, optimizer: Optimizer) -> str | None:
    """Why a step can't be captured, or ``None``."""
    engine = learner.report.engine
    if engine != "native":
        return f"the {engine} engine runs the model, which can't be captured"
    if not isinstance(optimizer, OneCall):
        name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        return f"the optimizer is {name}, not one of fastmaml.optim"
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    if any(hooks):
        return "the optimizer has hooks, which a replayed step would not call"
    if any(
        p._backward_hooks or p._post_accumulate_grad_hooks for p in learner.parameters()
    ):
        return "a parameter has hooks, which a replayed step would not call"
    return None


def _draws_there(parts: Parts) -> bool:
    """Whether drawing tasks is kernels alone, from a stream on the device."""
    stream = getattr(parts.tasks, "_stream", None)
    place = getattr(parts.tasks, "_place", None)
    if place is None or not isinstance(stream, DeviceStream):
        return False
    return stream.place.device == parts.parameters[0].device
