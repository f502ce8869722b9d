"""The meta-loss as one node of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# computes the loss and the gradients of the Function's inputs, in their order
Compute = Callable[[], tuple[Tensor, list[Tensor]]]


class MetaLoss(torch.autograd.Function):
    """Forward runs the engine and keeps the meta-gradient; backward scales it."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, *inputs: Tensor) -> Tensor:
        """Returns the loss; ``inputs`` are there for autograd alone."""
        loss, ctx.gradients = compute()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the kept gradients times the gradient of the loss."""
        return (None, *(g * outer[0] for g in ctx.gradients))
