"""Watching a run: its loss for divergence, the process for signals to stop."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastmaml._native import NativeUnavailable, core
from fastmaml.learners.details import MetaLossDetails

WARM_UP = 20
DECAY = 0.95


class DivergenceError(RuntimeError):
    """The loss or a parameter is no longer of use; says where to go back to."""


class LossWatch:
    """Sums of the loss and accuracy between rows, and a guard against divergence.

    On the CPU every loss is read, which is cheap. On a GPU a read would wait for the
    device, so sums are left there until a row is due and the guard looks at their mean.

    Args:
        factor: the running mean may reach this times the mean of the first losses.
    """

    def __init__(self, factor: float) -> None:
        if not factor > 1:
            raise ValueError(f"divergence_factor must be above 1, got {factor}")
        self.factor = factor
        self.loss: Any = 0.0
        self.accuracy: Any = 0.0
        self.count = 0
        self.classes = False
        self.seen = 0
        self.first = 0.0
        self.mean = 0.0
        self.latest = math.nan
        self.shown: tuple[float, float | None] = (math.nan, None)
        self.there: Tensor | None = None

    def add(self, loss: Tensor, learner: Any) -> bool:
        """Adds the loss of an iteration; whether training may go on."""
        self.count += 1
        accuracy = _accuracy(learner.last)
        if accuracy is not None:
            self.classes = True
            self.accuracy += accuracy
        value = loss.item()
        self.loss += value
        return self._guard(value)

    def leave_on(self, device: torch.device) -> None:
        """Keeps the sums on a device from now on, for :meth:`gather`."""
        so_far = [float(self.loss), float(self.accuracy)]
        self.there = torch.tensor(so_far, dtype=torch.float64).to(device)
        self.loss, self.accuracy = 0.0, 0.0

    @property
    def sums(self) -> Tensor:
        """[2] float64 of losses and accuracies on the device; never another tensor."""
        assert self.there is not None
        return self.there

    def gather(self, loss: Tensor, learner: Any) -> None:
        """Adds a loss to the sums on the device; the caller counts the iterations."""
        self.sums[0].add_(loss.detach())
        scores = getattr(learner.last, "query_accuracy", None)
        if scores is not None:
            self.classes = True
            self.sums[1].add_(scores[:, -1].mean())

    def _guard(self, value: float) -> bool:
        self.latest = value
        if not math.isfinite(value):
            return False
        self.seen += 1
        if self.seen <= WARM_UP:
            self.first += (abs(value) - self.first) / self.seen
            self.mean = self.first
            return True
        self.mean = DECAY * self.mean + (1 - DECAY) * abs(value)
        return self.mean <= self.factor * self.first

    def take(self) -> tuple[float, float | None]:
        """Means since the last call, and begins anew; the accuracy may be ``None``."""
        if self.count:
            self.shown = self._means()
        if self.there is not None:
            if not self._guard(self.shown[0]):
                self.shown = (math.nan, self.shown[1])
            self.there.zero_()
        self.loss, self.accuracy, self.count = 0.0, 0.0, 0
        return self.shown

    def recent(self) -> tuple[float, float | None]:
        """Means since the last :meth:`take`, or what it returned.

        Of sums on a device the latter, so that nobody waits, unless there is none yet.
        """
        waits = self.there is not None and not math.isnan(self.shown[0])
        return self.shown if waits or not self.count else self._means()

    def _means(self) -> tuple[float, float | None]:
        loss, accuracy = self._totals()
        return loss / self.count, accuracy / self.count if self.classes else None

    def _totals(self) -> tuple[float, float]:
        if self.there is None:
            return float(self.loss), float(self.accuracy)
        loss, accuracy = self.there.tolist()
        return loss, accuracy

    def complaint(self) -> str:
        """Why training can't go on."""
        if not math.isfinite(self.latest):
            return f"the loss is {self.latest}"
        return (
            f"the running mean of the loss, {self.mean:.4g}, is more than "
            f"{self.factor:g} times that of the first iterations, {self.first:.4g}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Sums and guard as plain numbers."""
        loss, accuracy = self._totals()
        return {
            "loss": loss,
            "accuracy": accuracy,
            "count": self.count,
            "classes": self.classes,
            "seen": self.seen,
            "first": self.first,
            "mean": self.mean,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)


def _accuracy(details: Any) -> float | None:
    """Accuracy after the last step, mean over tasks."""
    if isinstance(details, MetaLossDetails):
        return details.mean_accuracy
    scores = getattr(details, "query_accuracy", None)
    return None if scores is None else scores[:, -1].mean().item()


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to stop between iterations.

    A second one acts as if nobody had asked: it interrupts at once. Outside the main
    thread Python does not let signals be caught, and this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the handlers of before back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def set_threads(threads: int | None) -> None:
    """Sets the CPU threads of torch and of the native engine; ``None`` leaves them.

    Raises:
        ValueError: ``threads`` is less than 1.
    """
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)
    # without the extension there are only torch's threads
    with contextlib.suppress(NativeUnavailable):
        core().set_num_threads(threads)
