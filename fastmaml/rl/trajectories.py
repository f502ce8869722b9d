"""What rollouts leave behind, and what the losses of policies read of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_TENSORS = ("x", "actions", "advantages", "weights", "outputs")  # of samples


@dataclass(frozen=True)
class Trajectories:
    """Episodes of all tasks, padded with zeros to one length.

    Attributes:
        observations: [T, E, H, O] what the policy saw.
        actions: [T, E, H, A] what it drew, before any clipping by the environment; of
            categorical policies the action's number, A = 1.
        rewards: [T, E, H].
        mask: [T, E, H] bool, whether the step was taken.
        outputs: [T, E, H, Z] what the network put out, which is the distribution that
            actions were drawn from.
        failures: episodes that ended because the simulator was no longer finite.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    mask: Tensor
    outputs: Tensor
    failures: int = 0

    @property
    def tasks(self) -> int:
        """T."""
        return self.mask.shape[0]

    @property
    def steps(self) -> int:
        """Steps taken in all."""
        return int(self.mask.sum())

    def returns(self) -> Tensor:
        """Undiscounted return of every task, mean over its episodes, [T]."""
        return self.rewards.sum(2, dtype=torch.float64).mean(1)


@dataclass(frozen=True)
class Samples:
    """The steps of trajectories as samples of a task, for losses that are means.

    Steps that were not taken are there with weight zero; the others weigh alike, and
    the weights of a task have mean one.

    Attributes:
        x: [T, N, O] observations.
        actions: [T, N, A].
        advantages: [T, N], zero where no step was taken.
        weights: [T, N].
        outputs: [T, N, Z] of the policy that drew the actions.
        length: how many samples in a row are a trajectory; divides N.
    """

    x: Tensor
    actions: Tensor
    advantages: Tensor
    weights: Tensor
    outputs: Tensor
    length: int = 1

    @classmethod
    def of(cls, trajectories: Trajectories, advantages: Tensor) -> Samples:
        """Joins episodes and steps; advantages are [T, E, H]."""
        mask = trajectories.mask.to(advantages.dtype)
        taken = mask.sum((1, 2), keepdim=True).clamp_min(1)
        weights = mask * (mask[0].numel() / taken)
        dtype = trajectories.observations.dtype

        def joined(value: Tensor) -> Tensor:
            return value.flatten(1, 2).to(dtype)

        return cls(
            x=joined(trajectories.observations),
            actions=joined(trajectories.actions),
            advantages=joined(advantages * mask),
            weights=joined(weights),
            outputs=joined(trajectories.outputs),
            length=mask.shape[2],
        )

    def every(self, stride: int, first: int = 0) -> Samples:
        """Every ``stride``-th sample from ``first`` on, of the same mean weight.

        They are trajectories of one step then.
        """
        if stride == 1:
            return self

        def thinned(value: Tensor) -> Tensor:
            return value[:, first::stride].contiguous()

        weights = thinned(self.weights)
        mean = weights.mean(1, keepdim=True)
        weights = torch.where(mean > 0, weights / mean.clamp_min(1e-30), weights)
        return Samples(
            thinned(self.x),
            thinned(self.actions),
            thinned(self.advantages),
            weights,
            thinned(self.outputs),
        )

    def of_tasks(self, count: int) -> Samples:
        """Those of the first tasks."""
        return replace(self, **{n: getattr(self, n)[:count] for n in _TENSORS})

    def double(self) -> Samples:
        """The same in float64."""
        return replace(self, **{n: getattr(self, n).double() for n in _TENSORS})
