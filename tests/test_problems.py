"""The table of problems is what its users rely on."""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from engines import detached, loss_of
from problems import BY_NAME, PROBLEMS
from torch import nn
from torch.func import functional_call

from fastmaml.compile import compile_module, infer_shapes

KINKED = nn.ReLU | nn.LeakyReLU | nn.ELU


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_problem_compiles_and_infers_its_outputs(problem):
    report = compile_module(problem.build(), problem.loss, problem.reduction)
    assert report.program is not None, str(report)
    shapes = infer_shapes(report.program, problem.input_shape)
    assert shapes[-1] == (problem.outputs,)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_samples_and_parameters_are_repeatable_and_alive(problem):
    first, second = problem.build(), problem.build()
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    tasks = problem.tasks()
    assert torch.equal(tasks.query_x, problem.tasks().query_x)
    output = functional_call(first, detached(first), (tasks.support_x[0],))
    loss = loss_of(problem).function(output, tasks.support_y[0])
    assert 1e-3 < loss.abs() < 1e3


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_inputs_of_kinked_activations_are_away_from_zero(problem):
    """Rounding in float32 can't push an input across the kink at the start."""
    model, tasks = problem.build(), problem.tasks()
    nearest = []
    for module in model.modules():
        if isinstance(module, KINKED):
            module.register_forward_hook(
                # an exact zero is what a ReLU before left, in any precision
                lambda module, inputs, output: nearest.append(
                    inputs[0][inputs[0] != 0].abs().min()
                )
            )
    with torch.no_grad():
        for x in (*tasks.support_x, *tasks.query_x):
            model(x)
    assert not nearest or min(nearest) > 5e-6


def test_closeness_judges_elements_and_the_whole():
    want = torch.linspace(1, 2, 100, dtype=torch.float64)
    assert_close(want, want, "exact", "same")
    one_wrong, all_wrong = want.clone(), want * (1 + 1e-10)
    one_wrong[7] += 1e-7
    with pytest.raises(AssertionError, match=r"some problem: value\[7\]"):
        assert_close(one_wrong, want, "float64 pass", "some problem")
    with pytest.raises(AssertionError, match="some problem: L2 error"):
        assert_close(all_wrong, want, "float64 pass", "some problem")
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(want / 0, want, "float32 chain", "some problem")
    with pytest.raises(AssertionError, match="got tensors"):
        assert_close({"a": want}, {"b": want}, "float32 chain", "some problem")


def test_problem_names_are_unique():
    assert len(BY_NAME) == len(PROBLEMS) > 100
