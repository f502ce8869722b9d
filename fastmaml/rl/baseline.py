"""A linear baseline on features of observation and time, fitted for each task."""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = 10.0
RIDGE = 1e-5


def features(observations: Tensor) -> Tensor:
    """[o, o², t/100, (t/100)², (t/100)³, 1], with o clipped to ±10.

    Args:
        observations: [T, E, H, O].

    Returns:
        [T, E, H, 2 O + 4] float64.
    """
    o = observations.double().clamp(-CLIP, CLIP)
    time = torch.arange(o.shape[2], dtype=o.dtype) / 100
    powers = torch.stack([time, time**2, time**3, torch.ones_like(time)], -1)
    out = o.new_empty((*o.shape[:3], 2 * o.shape[3] + 4))
    size = o.shape[3]
    out[..., :size] = o
    torch.square(o, out=out[..., size : 2 * size])
    out[..., 2 * size :] = powers
    return out


def fit_values(
    observations: Tensor, returns: Tensor, mask: Tensor, ridge: float = RIDGE
) -> Tensor:
    """Values of the observations by the fit to their own returns.

    For every task w = (F'F + ridge I)^-1 F'G over the steps that were taken; all tasks
    are one batched solve in float64.

    Args:
        observations: [T, E, H, O].
        returns: [T, E, H] discounted.
        mask: [T, E, H] bool, whether the step was taken.
        ridge: added to the diagonal; ten times as much where that is not enough.

    Returns:
        [T, E, H] float64, zero where no step was taken.

    Source:
        Duan et al. 2016, "Benchmarking deep reinforcement learning for continuous
        control".
    """
    shape = returns.shape
    f = features(observations)
    if not bool(mask.all()):
        f *= mask.unsqueeze(-1)
    f = f.flatten(1, 2)
    target = (returns.double() * mask).flatten(1, 2).unsqueeze(-1)
    gram, moment = f.mT @ f, f.mT @ target
    weights = _solve(gram, moment, ridge)
    return (f @ weights).view(shape)


def _solve(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    for _ in range(5):
        factor, info = torch.linalg.cholesky_ex(gram + ridge * eye)
        if not bool(info.any()):
            return torch.cholesky_solve(moment, factor)
        ridge *= 10
    return torch.linalg.lstsq(gram + ridge * eye, moment, driver="gelsd").solution
