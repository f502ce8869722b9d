"""Details of one meta-loss, made into tensors when somebody looks at them."""

from __future__ import annotations

import torch
from torch import Tensor


class MetaLossDetails:
    """Details of one meta-loss.

    Attributes:
        loss: [] as returned, without its graph.
        query_loss: [T, K+1] after each inner step; NaN where w_k is zero.
        query_accuracy: [T, K+1] likewise, or ``None`` for losses without classes.
        mean_accuracy: accuracy after the last step, mean over tasks, or ``None``.
    """

    __slots__ = ("_accuracy", "_loss", "_metrics", "_tasks", "_value")

    _accuracy: float | None
    _loss: Tensor | torch.dtype
    _metrics: tuple[Tensor | None, Tensor | None] | bytearray | Tensor
    _tasks: int
    _value: float

    def __init__(
        self,
        loss: Tensor,
        query_loss: Tensor | None,
        query_accuracy: Tensor | None,
    ) -> None:
        self._loss = loss
        self._metrics = (query_loss, query_accuracy)

    @classmethod
    def lazily(
        cls,
        value: float,
        dtype: torch.dtype,
        accuracy: float | None,
        tasks: int,
        metrics: bytearray | Tensor,
        loss: Tensor | None = None,
    ) -> MetaLossDetails:
        """From what the native engine leaves.

        Args:
            value: the loss; not read if there is a tensor of it.
            dtype: of the tensors to be.
            accuracy: after the last step, mean over tasks; ``None`` without classes,
                and not read if the metrics are a tensor.
            tasks: T.
            metrics: query losses and accuracies, [2, T, K+1] float64: bytes, or a
                tensor on a GPU, which is waited for when somebody reads a number.
            loss: [] on a GPU.
        """
        details = object.__new__(cls)
        details._value, details._loss = value, dtype if loss is None else loss
        details._accuracy, details._tasks, details._metrics = accuracy, tasks, metrics
        return details

    @property
    def loss(self) -> Tensor:
        """[] as returned, without its graph."""
        if isinstance(self._loss, torch.dtype):
            self._loss = torch.tensor(self._value, dtype=self._loss)
        return self._loss

    @property
    def query_loss(self) -> Tensor | None:
        """[T, K+1] after each inner step; NaN where w_k is zero."""
        return self._both()[0]

    @property
    def query_accuracy(self) -> Tensor | None:
        """[T, K+1] after each inner step, or ``None`` for losses without classes."""
        return self._both()[1]

    @property
    def mean_accuracy(self) -> float | None:
        """Accuracy after the last step, mean over tasks; ``None`` without classes."""
        if isinstance(self._metrics, bytearray):
            return self._accuracy
        scores = self._both()[1]
        return None if scores is None else scores[:, -1].mean().item()

    def _both(self) -> tuple[Tensor | None, Tensor | None]:
        if not isinstance(self._metrics, tuple):
            found = self._metrics
            if isinstance(found, bytearray):
                found = torch.frombuffer(found, dtype=torch.float64)
            losses, scores = found.view(2, self._tasks, -1).to(self.loss.dtype)
            self._metrics = (losses, None if self._accuracy is None else scores)
        return self._metrics
