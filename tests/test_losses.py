"""Losses against torch's own, which the oracles of the engines take for granted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from torch.distributions import Normal

from fastmaml.losses import (
    accuracy,
    cross_entropy,
    gaussian_log_probability,
    mse,
    policy_gradient,
    resolve_loss,
)


def normal(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_mse_is_a_mean_over_samples_and_outputs():
    output, target = normal(7, 3), normal(7, 3) + 1
    assert_close(mse(output, target), F.mse_loss(output, target), "float64 pass", "mse")


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_cross_entropy_and_its_sum_over_ways(scale):
    scores, classes = scale * normal(7, 5), torch.tensor([0, 4, 2, 2, 1, 3, 0])
    want = F.cross_entropy(scores, classes)
    assert_close(cross_entropy(scores, classes), want, "float64 pass", "mean")
    summed = cross_entropy(scores, classes, "sum_over_ways")
    assert_close(summed, 5 * want, "float64 pass", "sum over ways")
    resolved = resolve_loss("cross_entropy", "sum_over_ways")
    assert torch.equal(resolved.function(scores, classes), summed)


def test_policy_gradient_is_the_weighted_log_density():
    mean, log_std, actions, advantage = (normal(6, n) for n in (3, 3, 3, 1))
    log_std = 0.3 * log_std - 1
    density = Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    output = torch.cat([mean, log_std], -1)
    got = gaussian_log_probability(output, actions)
    assert_close(got, density, "float64 pass", "density")
    loss = policy_gradient(output, torch.cat([actions, advantage], -1))
    want = -(density * advantage[:, 0]).mean()
    assert_close(loss, want, "float64 pass", "policy gradient")


def test_accuracy_is_the_share_of_highest_scores():
    scores = torch.eye(4, dtype=torch.float64)
    assert accuracy(scores, torch.tensor([0, 1, 2, 0])).item() == 0.75
    assert accuracy(scores, torch.arange(4)).dtype == torch.float64


def test_resolved_losses_know_their_kind():
    assert resolve_loss("mse").accuracy is None and resolve_loss("mse").native
    assert resolve_loss("cross_entropy").accuracy is accuracy
    own = resolve_loss(F.l1_loss)
    assert (own.name, own.native) == ("l1_loss", False)
