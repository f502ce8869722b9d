"""Losses against torch's own, which the oracles of the engines take for granted."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from torch.distributions import Categorical, Normal, kl_divergence

from fastmaml.losses import (
    LOG_STD_FLOOR,
    accuracy,
    categorical_kl,
    categorical_likelihood_ratio,
    categorical_policy_gradient,
    cross_entropy,
    gaussian_kl,
    gaussian_log_probability,
    gaussian_parameters,
    likelihood_ratio,
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


def test_likelihood_ratio_and_its_gradient_where_nothing_has_changed():
    output, actions, advantage = normal(6, 4).requires_grad_(), normal(6, 2), normal(6)
    old = gaussian_log_probability(output, actions).detach()
    target = torch.cat([actions, advantage[:, None], old[:, None]], -1)
    loss = likelihood_ratio(output, target)
    assert_close(loss.detach(), -advantage.mean(), "float64 pass", "ratio of one")
    (got,) = torch.autograd.grad(loss, output)
    (want,) = torch.autograd.grad(policy_gradient(output, target[:, :-1]), output)
    assert_close(got, want, "float64 pass", "score")
    lower = likelihood_ratio(output, target + math.log(2.0) * torch.eye(4)[3].double())
    assert_close(lower, loss / 2, "float64 pass", "half the ratio")


def test_divergences_are_torchs():
    output, old, weight = normal(6, 4), 0.5 * normal(6, 4) - 1, normal(6, 1)
    normals = [Normal(z[:, :2], z[:, 2:].exp()) for z in (old, output)]
    want = (kl_divergence(*normals).sum(-1) * weight[:, 0]).mean()
    got = gaussian_kl(output, torch.cat([old, weight], -1))
    assert_close(got, want, "float64 pass", "Gaussian")
    want = kl_divergence(Categorical(logits=old), Categorical(logits=output))
    got = categorical_kl(output, torch.cat([old, weight], -1))
    assert_close(got, (want * weight[:, 0]).mean(), "float64 pass", "categorical")


def test_categorical_losses_are_torchs():
    scores, advantage, old = normal(6, 5), normal(6, 1), normal(6, 1)
    actions = torch.tensor([0, 4, 2, 2, 1, 3])
    log_probability = Categorical(logits=scores).log_prob(actions)
    target = torch.cat([actions[:, None].double(), advantage, old], -1)
    want = -(log_probability * advantage[:, 0]).mean()
    got = categorical_policy_gradient(scores, target[:, :2])
    assert_close(got, want, "float64 pass", "policy gradient")
    want = -((log_probability - old[:, 0]).exp() * advantage[:, 0]).mean()
    got = categorical_likelihood_ratio(scores, target)
    assert_close(got, want, "float64 pass", "likelihood ratio")


def test_spreads_are_floored_without_a_slope():
    output = torch.tensor([[0.3, -20.0]], dtype=torch.float64, requires_grad=True)
    mean, log_std = gaussian_parameters(output)
    assert log_std.item() == LOG_STD_FLOOR == math.log(1e-6)
    target = torch.tensor([[0.3, 1.0]], dtype=torch.float64)
    (slope,) = torch.autograd.grad(policy_gradient(output, target), output)
    assert slope[0, 1] == 0


def test_accuracy_is_the_share_of_highest_scores():
    scores = torch.eye(4, dtype=torch.float64)
    assert accuracy(scores, torch.tensor([0, 1, 2, 0])).item() == 0.75
    assert accuracy(scores, torch.arange(4)).dtype == torch.float64


def test_resolved_losses_know_their_kind():
    assert resolve_loss("mse").accuracy is None and resolve_loss("mse").native
    assert resolve_loss("cross_entropy").accuracy is accuracy
    own = resolve_loss(F.l1_loss)
    assert (own.name, own.native) == ("l1_loss", False)
