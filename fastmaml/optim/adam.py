"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastmaml import _native
from fastmaml.optim.base import OneCall, Prepared, step

_STEP = torch.float32


class _Moments(OneCall):
    """Adam and AdamW, which differ in ``decoupled_weight_decay`` alone."""

    _decoupled = False

    def _options(self, group: dict[str, Any]) -> Any:
        return group["amsgrad"]

    def _prepare(self, found: Prepared, group: dict[str, Any], number: int) -> None:
        for (dtype, device), pairs in self._sorted(found, number).items():
            names = ["exp_avg", "exp_avg_sq"]
            names += ["max_exp_avg_sq"] * bool(group["amsgrad"])
            steps = [self._step_counter(found, p) for p, _ in pairs]
            states = {
                n: [self._state_like(found, p, n) for p, _ in pairs] for n in names
            }
            gradients = [g for _, g in pairs]
            params = [p for p, _ in pairs]
            found.tensors += params + gradients
            place = self._placement(device)
            arrivals = 0
            if not place.on_host:  # see csrc/cuda/optimizer.cu
                found.kept.append(torch.zeros(1, dtype=torch.int32, device=device))
                arrivals = _native.own_address(found.kept[-1])
            kind = getattr(_native.core(), f"Adam{dtype}")
            call = kind(
                [p.numel() for p in params],
                _native.addresses(params),
                _native.addresses(gradients),
                _native.addresses(states["exp_avg"]),
                _native.addresses(states["exp_avg_sq"]),
                _native.addresses(states.get("max_exp_avg_sq", [])),
                _native.addresses(steps),
                arrivals,
            )
            found.calls.append((place, call))

    def _step_counter(self, found: Prepared, p: Tensor) -> Tensor:
        entry = self.state[p]
        step = entry.get("step")
        kept = (
            isinstance(step, Tensor)
            and step.dtype == _STEP
            and step.device == p.device
            and step.numel() == 1
        )
        if not kept:
            count = 0.0 if step is None else float(step)
            step = torch.tensor(count, dtype=_STEP, device=p.device)
            entry["step"] = step
        found.tensors.append(step)
        found.states.append(step)
        return step

    def _call(
        self, call: Any, where: tuple[int, int, int], group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        call.step(
            where,
            float(group["lr"]),
            float(beta1),
            float(beta2),
            group["eps"],
            group["weight_decay"],
            self._decoupled or group.get("decoupled_weight_decay", False),
            group["maximize"],
        )


class Adam(_Moments, torch.optim.Adam):
    """Adam (Kingma and Ba 2015), as ``torch.optim.Adam`` but in one C++ call.

    Args:
        params: parameters, or groups of them, as in torch.
        lr: learning rate.
        betas: how fast the means of the gradient and of its square forget.
        eps: added to the root of the mean square.
        weight_decay: times the parameter joins the gradient.
        amsgrad: divide by the largest mean square so far (Reddi et al. 2018).
        maximize: climb instead of descend.

    Raises:
        TypeError, ValueError: a setting is out of range, or a parameter is sparse,
            complex, half precision or on a device without a backend (`torch.optim.Adam`
            takes those).
    """

    step = step

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        torch.optim.Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize
        )


class AdamW(_Moments, torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019): `Adam` with decoupled weight decay.

    Args:
        params: parameters, or groups of them, as in torch.
        lr: learning rate.
        betas: how fast the means of the gradient and of its square forget.
        eps: added to the root of the mean square.
        weight_decay: a step scales the parameter by 1 - lr times this.
        amsgrad: divide by the largest mean square so far.
        maximize: climb instead of descend.

    Raises:
        TypeError, ValueError: as `Adam` does.
    """

    _decoupled = True
    step = step

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize
        )
