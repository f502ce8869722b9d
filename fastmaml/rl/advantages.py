"""Returns and advantages of all episodes at once.

    G_t     = r_t + gamma G_{t+1}
    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = delta_t + gamma lambda A_{t+1}

where steps that were not taken have r = V = 0, and nothing is worth anything after an
episode's last step, whether it failed or ran out of time (as in the paper's code).
"""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """Sums over the steps to come, each discounted by how far it is.

    Args:
        values: [..., H].
        discount: per step.

    Returns:
        [..., H] sum over s >= t of discount^(s - t) values_s.
    """
    sums = torch.empty_like(values)
    later = torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        later = torch.add(values[..., t], later, alpha=discount)
        sums[..., t] = later
    return sums


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimates.

    Args:
        rewards: [T, E, H], zero where no step was taken.
        values: [T, E, H] of the observations, by a baseline.
        mask: [T, E, H] bool, whether the step was taken.
        gamma: discount of rewards.
        lam: 1 sums all rewards to come, 0 trusts the baseline after one.

    Returns:
        [T, E, H], zero where no step was taken.

    Source:
        Schulman et al. 2016, "High-dimensional continuous control using generalized
        advantage estimation".
    """
    values = values * mask
    after = torch.zeros_like(values)
    after[..., :-1] = values[..., 1:]
    delta = (rewards + gamma * after - values) * mask
    return discounted_sums(delta, gamma * lam) * mask


def standardised(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages of mean 0 and standard deviation 1 in every task.

    Args:
        advantages: [T, E, H].
        mask: [T, E, H] bool, whether the step was taken.

    Returns:
        [T, E, H], zero where no step was taken.
    """
    count = mask.sum((1, 2), keepdim=True).clamp_min(1)
    mean = (advantages * mask).sum((1, 2), keepdim=True) / count
    centred = (advantages - mean) * mask
    spread = (centred.square().sum((1, 2), keepdim=True) / count).sqrt()
    return centred / (spread + 1e-8)
