"""Meta-updates by Adam, on fixed trajectories, against torch's on the restatement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rl_problem import RLProblem, problem, restated, restated_clipped

from fastmaml.rl import learner as learner_module
from fastmaml.rl.adaptation import for_each_task
from fastmaml.rl.learner import MetaRL, Update

pytest.importorskip("gymnasium")

RATE = 0.01


def _learner(p: RLProblem, update: Update) -> MetaRL:
    nowhere: Any = None  # trajectories are there already
    return MetaRL(p.policy, nowhere, rates=p.rates, update=update)


def _restated(p: RLProblem, update: Update, theta: torch.Tensor) -> torch.Tensor:
    """Parameters [P] after the update, by autograd and torch's Adam."""
    leaf = theta.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], update.meta_lr)
    for _ in range(1 if update.outer == "vpg" else update.ppo_epochs):
        if update.outer == "vpg":
            loss = restated(p, leaf)[0]
        else:
            loss = restated_clipped(p, leaf, update.ppo_clip, update.ppo_kl)
        (leaf.grad,) = torch.autograd.grad(loss, leaf)
        adam.step()
    return leaf.detach()


@pytest.mark.parametrize("engine", ["native", "functional"])
@pytest.mark.parametrize(
    "update",
    [
        Update("vpg", meta_lr=RATE),
        Update("ppo", meta_lr=RATE, ppo_epochs=4),
        Update("ppo", meta_lr=RATE, ppo_epochs=4, ppo_clip=0.01, ppo_kl=2.0),
    ],
    ids=["vpg", "ppo", "ppo, tight"],
)
def test_an_update_is_torchs_on_the_restatement(update: Update, engine: str) -> None:
    p = problem("gaussian", "reinforce", 1, engine)
    objective = p.objective()
    want = _restated(p, update, objective.theta)
    report = _learner(p, update)._move(objective)
    got = objective.flat.join(p.policy.parameters())
    # Adam divides by the gradient's size: rounding grows where that is small
    assert (got - want).abs().max() < 1e-7
    assert (want - objective.theta).abs().max() > 0.9 * RATE
    assert report.accepted and report.kl > 0


@pytest.mark.parametrize("outer", ["vpg", "ppo"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_updates_lower_the_surrogate_of_fixed_trajectories(
    outer: Any, steps: int
) -> None:
    p = problem("gaussian", "reinforce", steps)
    objective = p.objective()
    learner = _learner(p, Update(outer, meta_lr=1e-3))
    best = objective.loss
    for _ in range(5):
        if outer == "vpg":  # its gradient is that of the old parameters alone
            objective = p.objective()
            best = objective.loss
        report = learner._move(objective)
        assert report.loss < best - 1e-6
        assert report.loss_before == objective.loss
        best = report.loss


@pytest.mark.parametrize(
    ("outer", "share", "many"),
    [("trpo", 1.0, True), ("trpo", 0.1, False), ("ppo", 1.0, False)],
)
def test_one_product_alone_is_not_kept(
    outer: Any, share: float, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem()
    learner = _learner(p, Update(outer, fisher_subsample=share))
    told = []

    def collected(*_: Any, **__: Any) -> None:
        raise StopIteration

    class Told(learner_module.Adaptation):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            told.append(options["many"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(learner_module, "Adaptation", Told)
    monkeypatch.setattr(learner_module, "collect", collected)
    with pytest.raises(StopIteration):
        learner.iterate([0, 1, 2], 0)
    assert told == [many]


def test_a_policys_move_leaves_what_was_adapted_from_it() -> None:
    theta = {"w": torch.ones(2, 3)}
    own = for_each_task(theta, 1)
    theta["w"].zero_()
    assert own["w"].sum() == 6


@pytest.mark.parametrize(
    ("outer", "share", "checked"),
    [("trpo", 0.5, 2), ("trpo", 1.0, 3), ("trpo", 0.01, 1), ("ppo", 0.5, 3)],
)
def test_a_share_of_the_tasks_is_for_searches_alone(
    outer: Any, share: float, checked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem()
    learner = _learner(p, Update(outer, search_subsample=share))
    told = []

    def objective(*_: Any, **options: Any) -> None:
        told.append(options["checked"])
        raise StopIteration

    monkeypatch.setattr(learner, "_collect", lambda *_: (None, [], p.batches))
    monkeypatch.setattr(learner_module, "MetaObjective", objective)
    with pytest.raises(StopIteration):
        learner.iterate([0, 1, 2], 0)
    assert told == [checked]


def test_no_share_at_all_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"search_subsample must be in \(0, 1\], got 0"
    ):
        _learner(problem(), Update(search_subsample=0))
