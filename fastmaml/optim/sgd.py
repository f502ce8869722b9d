"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastmaml import _native
from fastmaml.optim.base import OneCall, Prepared, step


class SGD(OneCall, torch.optim.SGD):
    """Stochastic gradient descent, as ``torch.optim.SGD`` but in one C++ call.

    Args:
        params: parameters, or groups of them, as in torch.
        lr: learning rate.
        momentum: part of the last step's direction that stays.
        dampening: part of the gradient that doesn't join the momentum.
        weight_decay: times the parameter joins the gradient.
        nesterov: step from where the momentum leads (Sutskever et al. 2013).
        maximize: climb instead of descend.

    Raises:
        TypeError, ValueError: as `Adam` does.
    """

    step = step

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        torch.optim.SGD.__init__(
            self,
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
        )

    def _options(self, group: dict[str, Any]) -> Any:
        return group["momentum"] != 0

    def _prepare(self, found: Prepared, group: dict[str, Any], number: int) -> None:
        for (dtype, device), pairs in self._sorted(found, number).items():
            params, gradients = [p for p, _ in pairs], [g for _, g in pairs]
            buffers: list[Tensor] = []
            first: list[bool] = []
            if group["momentum"] != 0:
                first = [self.state[p].get("momentum_buffer") is None for p in params]
                buffers = [
                    self._state_like(found, p, "momentum_buffer") for p in params
                ]
            found.tensors += params + gradients
            kind = getattr(_native.core(), f"Sgd{dtype}")
            call = kind(
                [p.numel() for p in params],
                _native.addresses(params),
                _native.addresses(gradients),
                _native.addresses(buffers),
                first,
            )
            found.calls.append((self._placement(device), call))

    def _call(
        self, call: Any, where: tuple[int, int, int], group: dict[str, Any]
    ) -> None:
        call.step(
            where,
            float(group["lr"]),
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
        )
