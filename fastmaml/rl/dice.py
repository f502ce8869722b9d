"""The Hessian of DiCE, in products with per-sample losses that engines have.

    box(x) = exp(x - stop_gradient(x))               W_t = sum over s <= t of log pi_s
    J      = sum over t of (box(W_t) - box(W_{t-1})) A_t         (loss = -J / samples)

is the objective of Farquhar et al. (2019, "Loaded DiCE") with lambda 1; with rewards to
come as A it is that of Foerster et al. (2018, "DiCE"), sum over t of box(W_t) r_t, for
the sums telescope. With s_t the score d(log pi_t) and H_t its derivative, at any
parameters,

    dJ    = sum of A_t s_t                                   that of REINFORCE
    d2J v = sum of A_t H_t v  +  sum of c_t s_t
    c_t   = A_t (sum over r <= t of d_r)  +  sum over r > t of A_r d_r,   d_t = s_t . v

so the curvature of a whole trajectory is the policy-gradient loss's product and its
gradient with c in place of advantages. Engines give both; d comes from torch's forward
mode, for engines have no tangents of single samples. The likelihood ratio's Hessian is
the same without the terms of two different steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from fastmaml.engines.base import Params
from fastmaml.rl.trajectories import Samples


def log_slopes(
    model: nn.Module,
    log_probability: Callable[[Tensor, Tensor], Tensor],
    params: Params,
    samples: Samples,
    v: Params,
) -> Tensor:
    """Derivatives of the log probabilities of actions along ``v``.

    Args:
        model: observations [N, O] to outputs [N, Z].
        log_probability: (outputs [T, N, Z], actions [T, N, A]) -> [T, N].
        params: name -> [T, ...].
        samples: with N samples of each task.
        v: name -> [T, ...].

    Returns:
        [T, N].
    """

    def one(own: dict[str, Tensor], x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(model, own, (x,))
        return outputs

    def log(own: dict[str, Tensor]) -> Tensor:
        return log_probability(vmap(one)(own, samples.x), samples.actions)

    with torch.no_grad():
        slopes: Tensor = jvp(log, (dict(params),), ({n: v[n] for n in params},))[1]
    return slopes


def trajectory_credits(advantages: Tensor, slopes: Tensor, length: int) -> Tensor:
    """The c of the formulas above.

    Args:
        advantages: [T, N], zero where no step was taken.
        slopes: [T, N], d.
        length: samples of a trajectory.

    Returns:
        [T, N].

    Raises:
        ValueError: N is no multiple of ``length``.
    """
    if advantages.shape[1] % length:
        raise ValueError(
            f"samples: expected whole trajectories of {length} steps, got "
            f"{advantages.shape[1]} samples; make N a multiple of length"
        )
    a = advantages.unflatten(1, (-1, length))
    d = slopes.unflatten(1, (-1, length))
    weighed = a * d
    later = weighed.sum(-1, keepdim=True) - weighed.cumsum(-1)
    return (a * d.cumsum(-1) + later).flatten(1)
