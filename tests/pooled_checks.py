"""What tests of pooled batch norms share, with and without a convolution below."""

from __future__ import annotations

import dataclasses

import backends
import oracles
import pytest
import torch
from close import assert_close
from native_cases import DTYPES, Case, cast, instruction_set, native, row
from test_native_isas import ISAS

every_isa = pytest.mark.parametrize("isa", ISAS)
both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)
SIZE = (7, 8)


def changed(c: Case, x: torch.Tensor | None = None, **own: torch.Tensor) -> Case:
    """The case with other support samples, or other parameters of the tasks."""
    tasks = c.tasks if x is None else dataclasses.replace(c.tasks, support_x=x)
    return dataclasses.replace(c, tasks=tasks, own={**c.own, **own})


def check(c: Case, isa: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Compares value, gradient and Hessian product with the oracle's; the gradient."""
    if backends.current() != "cpu" and isa != ISAS[0]:
        pytest.skip("instruction sets are the CPU's")
    exact, tasks = c.tasks, c.tasks.to(dtype=dtype)
    with instruction_set(isa):
        engine, own = native(c), cast(c.own, dtype)
        support = tasks.support_x, tasks.support_y
        value, gradient = engine.value_and_grad(own, *support)
        hvp = engine.hvp(own, *support, cast(c.vector, dtype))
    arguments = c.model, c.loss, c.own, exact.support_x, exact.support_y
    want_value, want_gradient = oracles.value_and_grad(*arguments)
    assert_close(value, want_value, row(dtype, "pass"), c.problem.name)
    assert_close(gradient, want_gradient, row(dtype, "pass"), c.problem.name)
    want_hvp = oracles.hvp(*arguments, c.vector)
    assert_close(hvp, want_hvp, row(dtype, "product"), c.problem.name)
    return gradient
