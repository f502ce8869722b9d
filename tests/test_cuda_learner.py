"""A learner on a GPU: where it runs, in whose order, and that nobody waits for it.

That the numbers are right is for the tests that run on every backend.
"""

from __future__ import annotations

import copy

import backends
import pytest
import torch
from close import assert_close
from engines import learner_for
from problems import BY_NAME

from fastmaml import optim
from fastmaml.train.captured import CapturedStep

reason = backends.why_not("cuda")
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
NAMES = ["sinusoid", "omniglot-fc", "policy", "conv-3to5-k3x3-s1x1-p1x1"]


def pair(name, device="cuda"):
    """The same learner on the CPU and on a GPU, and tasks for both."""
    problem = BY_NAME[name]
    model = problem.build()
    there = copy.deepcopy(model).to(device)
    learners = [learner_for(problem, "native", model=m) for m in (model, there)]
    tasks = problem.tasks(3)
    return learners, (tasks, tasks.to(device=device))


def check(name, device="cuda"):
    (here, there), (tasks, moved) = pair(name, device)
    want, got = here.backward(tasks), there.backward(moved)
    assert got.device == next(there.parameters()).device
    assert_close(got.cpu(), want, "float64 chain", name)
    for g, w in zip(there.parameters(), here.parameters(), strict=True):
        assert_close(g.grad.cpu(), w.grad, "float64 chain", name)


@pytest.mark.parametrize("name", NAMES)
def test_native_takes_the_gpu(name):
    (_, there), _ = pair(name)
    assert there.report.engine == "native" and "cuda" in there.report.device
    check(name)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_waits(name):
    (_, learner), (_, tasks) = pair(name)
    optimizer = optim.Adam(learner.parameters())
    for _ in range(3):
        learner.backward(tasks, accumulate=False)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.backward(tasks, accumulate=False)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_has_a_workspace_of_its_own():
    (here, there), (tasks, moved) = pair("omniglot-fc")
    want = here.backward(tasks)
    there.backward(moved)
    kept = there._engine._workspace
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = there.backward(moved, accumulate=False)
    stream.synchronize()
    assert there._engine._workspace is not kept
    assert_close(got.cpu(), want, "float64 chain", "omniglot-fc")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    check("omniglot-fc", "cuda:1")


def test_a_label_out_of_range_is_a_loss_that_is_no_number():
    (_, learner), (_, tasks) = pair("omniglot-fc")
    learner.backward(tasks)
    tasks.query_y[1, 2] = 99
    assert learner.backward(tasks).isnan()


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_precisions_differ_and_are_near(precision):
    problem = BY_NAME["omniglot-fc"]
    model = problem.build().float().cuda()
    tasks = problem.tasks(3).to(dtype=torch.float32, device="cuda")
    found = []
    for p in ("float32", precision):
        learner = learner_for(
            problem, "native", model=copy.deepcopy(model), precision=p
        )
        found.append(learner.backward(tasks).item())
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_a_captured_step_does_not_wait():
    (_, learner), (_, tasks) = pair("sinusoid")
    step = CapturedStep(learner, optim.Adam(learner.parameters()), tasks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = step(tasks).clone()
        second = step(tasks).clone()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert second < first
