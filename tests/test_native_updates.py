"""Updates applied where gradients are stored, and samples passing in chunks.

Without a gradient for the rates nobody needs the inner gradients themselves, so the
layers write theta_{k+1} and lambda_k directly; every layout of the rates and every
choice of adapted parameters takes its own way there.
"""

from __future__ import annotations

import oracles
import pytest
import torch
from backends import cpu_alone, current, on_every_backend
from chunked_problems import CHUNKED
from close import assert_close
from native_cases import (
    DTYPES,
    assert_same_bits,
    case,
    cast,
    native,
    passes_wanted,
    row,
    threads,
)
from problem import Problem
from torch import nn

from fastmaml.engines import Rates

pytestmark = on_every_backend

# the ReLU's backward passes belong to the linear layer behind, which has one output
# here and none of the hidden layer's columns is a whole vector
SMALL = [
    Problem("tails", lambda: nn.Sequential(*relu_layers(5, 21, 9, 1)), (5,), 1),
    Problem("halves", lambda: nn.Sequential(*relu_layers(3, 40, 40, 1)), (3,), 1),
    Problem("thin", lambda: nn.Sequential(*relu_layers(2, 1, 3, 2)), (2,), 2),
    Problem(
        "normed",
        lambda: nn.Sequential(
            nn.Linear(3, 6),
            nn.BatchNorm1d(6, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(6, 2),
        ),
        (3,),
        2,
    ),
    Problem(
        "conv",
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.Conv2d(6, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, 3, 1),
            nn.Flatten(),
            nn.Linear(12, 2),
        ),
        (2, 4, 4),
        2,
    ),
]


def relu_layers(*sizes: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i, o in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return layers[:-1]


def not_emulated(problem: Problem) -> None:
    """Skips what is large so as to pass in chunks, which only a CPU has."""
    if problem in CHUNKED and current() == "cuda_emulated":
        pytest.skip("in emulation by test_cuda_networks.py")


def check(problem: Problem, rates: Rates, steps: int, dtype, **options) -> None:
    not_emulated(problem)
    c = case(problem)
    engine = native(c, memory=options.pop("memory", "auto"))
    tasks = c.tasks.to(dtype=dtype)
    own = Rates(rates.values.to(dtype), rates.layout, rates.per_step, rates.adapted)
    params = cast(c.params, dtype)
    got = engine.meta_gradient(params, own, tasks, steps=steps, **options)
    want = oracles.meta_gradient(
        c.model, c.loss, c.params, rates, c.tasks, steps, **options
    )
    assert_close(got.loss, want.loss, row(dtype, "chain"), problem.name)
    assert_close(got.gradients, want.gradients, row(dtype, "chain"), problem.name)


def adapted_sets(problem: Problem) -> dict[str, frozenset[str] | None]:
    names = [n for n, _ in problem.build().named_parameters()]
    return {
        "all": None,
        "head": frozenset(names[-2:]),
        "body": frozenset(names[:-2]),
        "weights": frozenset(n for n in names if n.endswith("weight")),
        "biases": frozenset(n for n in names if n.endswith("bias")),
        "none": frozenset(),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("problem", [*SMALL, *CHUNKED], ids=str)
def test_meta_gradient(problem, steps, dtype):
    check(problem, case(problem).rates, steps, dtype)


@pytest.mark.parametrize("which", ["all", "head", "body", "weights", "biases", "none"])
@pytest.mark.parametrize("problem", [*SMALL, CHUNKED[0], CHUNKED[4]], ids=str)
def test_adapted_parameters(problem, which):
    adapted = adapted_sets(problem)[which]
    rate = case(problem).rates.values
    check(problem, Rates(rate, adapted=adapted), 2, torch.float64)


@pytest.mark.parametrize("layout", ["scalar", "per_tensor", "per_parameter"])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("problem", [*SMALL[:2], SMALL[3], CHUNKED[2]], ids=str)
def test_layouts_steps_and_weights(problem, layout, memory):
    params = [p for _, p in problem.build().named_parameters()]
    sizes = {
        "scalar": (),
        "per_tensor": (len(params),),
        "per_parameter": (sum(p.numel() for p in params),),
    }
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(3, *sizes[layout], generator=generator, dtype=torch.float64)
    rates = Rates(problem.inner_lr * (0.5 + noise), layout, per_step=True)
    weights = [0.1, 0.0, 0.3, 0.6]
    options = {"memory": memory, "loss_weights": weights}
    check(problem, rates, 3, torch.float64, **options)
    check(
        problem,
        rates,
        3,
        torch.float64,
        **{**options, "loss_weights": [0.5, 0, 0.5, 0]},
    )


@pytest.mark.parametrize("problem", CHUNKED, ids=str)
def test_chunks_do_not_depend_on_threads(problem):
    cpu_alone()
    c = case(problem, tasks=1)
    rates = case(problem).rates
    results = []
    for count in (1, 2, 4):
        with threads(count):
            found = native(c).meta_gradient(
                cast(c.params, torch.float32),
                rates,
                c.tasks.to(dtype=torch.float32),
                steps=2,
            )
        results.append(found.gradients)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_chunks_take_turns_in_the_memory_of_one():
    """The query's activations and the tangents need room for one chunk alone."""
    cpu_alone()
    c = case(CHUNKED[0])
    engine = native(c)
    rates = c.rates

    def slot(queries: int) -> int:
        tasks = CHUNKED[0].tasks(2, 8, queries)
        engine.meta_gradient(c.params, rates, tasks, steps=1)
        return engine.plan.slot

    assert slot(5000) == slot(500)


@pytest.mark.parametrize("problem", CHUNKED, ids=str)
def test_products_in_chunks(problem):
    """Layer norm, for one, saves a chunk's statistics in an order of their own."""
    not_emulated(problem)
    c = case(problem)
    own = c.own, c.tasks.support_x, c.tasks.support_y, c.vector
    for name in ("hvp", "gauss_newton_product"):
        got, want = getattr(native(c), name)(*own), passes_wanted(problem)[name]
        assert_close(got, want, row(torch.float64, "pass"), problem.name)
