"""One task at a time, in the idiom of a copy that adapts: `Learner.clone`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml.engines.base import Rates
from fastmaml.engines.layout import RateMap


class TaskModel:
    """A model whose parameters follow one task; gradients reach the learner's own.

    Runs on plain autograd, whatever the learner's engine: the graph of every inner
    step is kept until the backward pass. ``meta_loss`` is the fast path.

    Args:
        model: computes the outputs; its parameters are replaced by the task's.
        parameters: the learner's own, by name.
        rates: of the inner loop.
        first_order: whether inner gradients are constants.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        rates: Rates,
        first_order: bool,
    ) -> None:
        self._model = model
        self._rates = rates
        self._map = RateMap({n: p.shape for n, p in parameters.items()})
        self._first_order = first_order
        self._parameters = dict(parameters)
        self._steps = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [N, ...] of the task's model for x [N, ...]."""
        buffers = {n: b.clone() for n, b in self._model.named_buffers()}
        return functional_call(self._model, {**buffers, **self._parameters}, (x,))

    def adapt(self, loss: Tensor | Callable[[TaskModel], Tensor]) -> None:
        """One inner step down a loss of this task.

        Args:
            loss: scalar computed with this object, or a function of it that returns
                one.

        Raises:
            ValueError: if the loss is no scalar or doesn't depend on the task's
                parameters.
        """
        value = loss if isinstance(loss, Tensor) else loss(self)
        gradients = self._gradients(value)
        rates = self._map.by_name(self._rates, self._steps)
        for name, gradient in gradients.items():
            if gradient is not None:
                step = rates[name] * gradient
                self._parameters[name] = self._parameters[name] - step
        self._steps += 1

    def parameters(self) -> list[Tensor]:
        """The task's parameters, in the model's order."""
        return list(self._parameters.values())

    def named_parameters(self) -> dict[str, Tensor]:
        """The task's parameters by name."""
        return dict(self._parameters)

    def _gradients(self, loss: Tensor) -> dict[str, Tensor | None]:
        if loss.numel() != 1:
            raise ValueError(f"loss: expected a scalar, got shape {list(loss.shape)}")
        names = self._map.adapted(self._rates)
        inputs = [self._parameters[n] for n in names]
        found: Sequence[Tensor | None] = [None] * len(names)
        if loss.requires_grad:
            found = torch.autograd.grad(
                loss, inputs, create_graph=not self._first_order, allow_unused=True
            )
        if all(g is None for g in found):
            raise ValueError(
                "loss: doesn't depend on the task's parameters; compute it with the "
                "outputs of this task object, task(x), with gradients enabled"
            )
        return dict(zip(names, found, strict=True))
