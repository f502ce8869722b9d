"""A captured meta-step does what the step does that it was captured from."""

from __future__ import annotations

import copy

import backends
import pytest
import torch
from problems import BY_NAME

from fastmaml import MAML, optim
from fastmaml.train.captured import CapturedStep

PROBLEMS = ["sinusoid", "omniglot-fc", "policy"]
OPTIMIZERS = {
    "adam": lambda p: optim.Adam(p, 1e-3),
    "amsgrad": lambda p: optim.Adam(p, 1e-3, amsgrad=True),
    "momentum": lambda p: optim.SGD(p, 1e-2, momentum=0.9, dampening=0.5),
}
ENGINES = backends.usable(["cpu", "cpu_lockstep", "cuda_emulated", "cuda"])


def built(name, engine, optimizer):
    problem = BY_NAME[name]
    model = backends.placed(problem.build(), engine)
    learner = MAML(
        model,
        loss=problem.loss,
        inner_lr=problem.inner_lr,
        inner_steps=2,
        adapted=problem.adapted(model),
        learn_rates=True,
        rates="per_tensor",
        engine="native" if engine in ("cpu", "cuda") else engine,
    )
    chosen = OPTIMIZERS[optimizer](learner.parameters())
    chosen._backend = None if engine in ("cpu", "cuda") else engine
    return learner, chosen


def batches(name, engine, count=4):
    device = backends.device_of(engine)
    return [BY_NAME[name].tasks(3, seed=s).to(device=device) for s in range(count)]


def values(learner):
    return [p.detach().cpu().clone() for p in learner.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_steps_give_the_same_bits_captured(name, engine, optimizer):
    """Also where the optimizer has taken steps before, and the rate then changes."""
    plain, by_hand = built(name, engine, optimizer)
    learner, chosen = built(name, engine, optimizer)
    tasks = batches(name, engine)
    for each, step in ((plain, by_hand), (learner, chosen)):
        each.backward(tasks[0], accumulate=False)
        step.step()
    captured = CapturedStep(learner, chosen, tasks[0])
    for got, want in zip(values(learner), values(plain), strict=True):
        assert torch.equal(got, want), "building the step has moved a parameter"
    for i, batch in enumerate(tasks):
        for step in (by_hand, chosen):
            step.param_groups[0]["lr"] *= 0.5**i
        loss = captured(batch)
        assert torch.equal(loss, plain.backward(batch, accumulate=False))
        assert torch.equal(learner.last.query_loss[:, -1], plain.last.query_loss[:, -1])
        by_hand.step()
        for got, want in zip(values(learner), values(plain), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("engine", ENGINES)
def test_fresh_optimizers_start_from_zero(engine):
    plain, by_hand = built("sinusoid", engine, "adam")
    learner, chosen = built("sinusoid", engine, "adam")
    (batch,) = batches("sinusoid", engine, 1)
    captured = CapturedStep(learner, chosen, batch)
    captured(batch)
    plain.backward(batch, accumulate=False)
    by_hand.step()
    for got, want in zip(values(learner), values(plain), strict=True):
        assert torch.equal(got, want)
    assert all(float(s["step"]) == 1 for s in chosen.state.values())


def test_what_can_not_be_captured():
    learner, chosen = built("sinusoid", "cpu", "adam")
    tasks = BY_NAME["sinusoid"].tasks(3)
    with pytest.raises(TypeError, match="expected one of fastmaml.optim, got torch"):
        CapturedStep(learner, torch.optim.Adam(learner.parameters()), tasks)
    learner, chosen = built("sinusoid", "cpu", "momentum")
    with pytest.raises(ValueError, match="Take one step before capturing"):
        CapturedStep(learner, chosen, tasks)
    learner, chosen = built("sinusoid", "cpu", "adam")
    slow = MAML(copy.deepcopy(learner.model), engine="functional")
    with pytest.raises(ValueError, match="expected one on the native engine"):
        CapturedStep(slow, optim.Adam(slow.parameters()), tasks)
    captured = CapturedStep(learner, chosen, tasks)
    with pytest.raises(ValueError, match="support_x: expected .* as when the step"):
        captured(BY_NAME["sinusoid"].tasks(2))
