"""All tasks at once, as a GPU takes them: the same kernels give the same bits.

The backend `cpu_lockstep` has the kernels of the CPU, but is given every task in one
call, in memory that the driver must not look into. Whatever differs from the CPU's own
way is the driver's fault: strides, offsets, scales, tables, metrics.
"""

from __future__ import annotations

import dataclasses
import math

import fused_problems
import pytest
import torch
from chunked_problems import CHUNKED
from close import assert_close
from engines import learner_for, rates_of
from native_cases import DTYPES, assert_same_bits, case, everything, native, row
from problems import BY_NAME, PROBLEMS

LAYOUTS = ["scalar", "per_tensor", "per_parameter"]
VARIED = [
    "linear-9to15",
    "policy",
    "omniglot-conv",
    "batch-norm-not-adapted",
    "conv-3to5-k3x3-s1x1-p1x1",
    "append-parameter",
]
by_id = {"ids": str}
both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)


def both(c, **options):
    return native(c, **options), native(c, backend="cpu_lockstep", **options)


@both_dtypes
@pytest.mark.parametrize("problem", [*PROBLEMS, *fused_problems.FUSED], **by_id)
def test_every_call_gives_the_same_bits(problem, dtype):
    c = case(problem, tasks=3)
    alone, together = both(c)
    assert_same_bits(everything(together, c, dtype), everything(alone, c, dtype))
    assert together.plan.slots == 1 and together._place.lockstep


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("per_step", [False, True], ids=["shared", "per-step"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VARIED)
def test_every_driver_option_gives_the_same_bits(
    name, layout, per_step, first_order, memory
):
    c = case(name, tasks=3)
    rates = rates_of(c.problem, c.model, layout, per_step, steps=2)
    for adapted in (rates.adapted, frozenset([*c.params][::2]), frozenset()):
        for rate_gradient in (False, True):
            alone, together = (
                engine.meta_gradient(
                    c.params,
                    dataclasses.replace(rates, adapted=adapted),
                    c.tasks,
                    steps=3,
                    first_order=first_order,
                    loss_weights=[0.1, 0.0, 0.7, 0.4],
                    rate_gradient=rate_gradient,
                )
                for engine in both(c, memory=memory)
            )
            assert_same_bits(together.gradients, alone.gradients)
            pairs = {"query_loss": (together.query_loss, alone.query_loss)}
            if rate_gradient:
                pairs["rates"] = (together.rate_gradient, alone.rate_gradient)
            assert_same_bits(
                {n: got for n, (got, _) in pairs.items()},
                {n: want for n, (_, want) in pairs.items()},
            )
            assert_close(together.loss, alone.loss, "float64 pass", name)


@pytest.mark.parametrize("name", VARIED)
def test_parameters_of_every_task(name):
    c = case(name, tasks=3)
    rates = rates_of(c.problem, c.model, "per_parameter", True, steps=2)
    alone, together = (
        e.meta_gradient(c.own, rates, c.tasks, steps=2, rate_gradient=True)
        for e in both(c)
    )
    assert_same_bits(together.gradients, alone.gradients)
    assert torch.equal(together.rate_gradient, alone.rate_gradient)


@pytest.mark.parametrize("problem", CHUNKED, **by_id)
def test_what_passes_in_chunks_alone_passes_whole_in_lockstep(problem):
    """The sums over samples are then taken in another order: no bits to compare."""
    c = case(problem, tasks=3)
    alone, together = (everything(e, c) for e in both(c))
    assert set(alone) == set(together)
    for n, want in alone.items():
        assert_close(together[n], want, row(torch.float64, "chain"), problem.name)


@pytest.mark.parametrize("options", [{}, {"learn_rates": True, "rates": "per_tensor"}])
@pytest.mark.parametrize("name", VARIED)
def test_prepared_calls_of_a_learner(name, options):
    """`backward` several times: what is prepared once holds for later tasks."""
    problem = BY_NAME[name]
    # tasks that the CPU does in one piece are added up in another order
    options = {**options, "memory": "keep"}
    learners = [learner_for(problem, e, **options) for e in ("native", "cpu_lockstep")]
    for seed in range(3):
        tasks = problem.tasks(3, seed=seed)
        for layout in (tasks, swapped(tasks)):
            found = []
            for learner in learners:
                loss = learner.backward(layout, accumulate=False)
                grads = {n: p.grad.clone() for n, p in learner.named_parameters()}
                last = learner.last
                scores = {"query_loss": last.query_loss, "last": last.loss}
                if last.query_accuracy is not None:
                    scores["accuracy"] = last.query_accuracy
                found.append((loss, grads, scores, last.mean_accuracy))
            (want, wanted, kept, score), (got, grads, scores, mean) = found
            assert_same_bits(grads, wanted)
            assert_close(got, want, "float64 pass", name)
            assert_same_bits(
                {"query_loss": scores["query_loss"]}, {"query_loss": kept["query_loss"]}
            )
            assert (mean is None) == (score is None)
            assert mean is None or mean == pytest.approx(score, rel=1e-12)


def swapped(tasks):
    """The same values, images channels last in memory."""
    if tasks.support_x.dim() != 5:
        return tasks
    last = (x.movedim(2, -1).contiguous().movedim(-1, 2) for x in _inputs(tasks))
    support_x, query_x = last
    return dataclasses.replace(tasks, support_x=support_x, query_x=query_x)


def _inputs(tasks):
    return tasks.support_x, tasks.query_x


def test_a_label_out_of_range_shows_as_a_loss_that_is_no_number():
    c = case("cross-entropy-5-n5-mean", tasks=3)
    tasks = dataclasses.replace(c.tasks, query_y=c.tasks.query_y.clone())
    tasks.query_y[1, 2] = 99
    _, together = both(c)
    got = together.meta_gradient(c.params, c.rates, tasks, steps=1)
    assert got.query_loss[:, 1].isnan().tolist() == [False, True, False]
    assert math.isnan(got.loss)


def test_the_report_says_which_backend_was_asked_for():
    learner = learner_for(BY_NAME["linear-9to15"], "cpu_lockstep")
    assert learner.report.engine == "native"
    assert "cpu_lockstep" in str(learner.report)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("engine", ["native", "auto", "functional", "cpu_lockstep"])
def test_precisions_that_a_cpu_does_not_have(engine, precision):
    with pytest.raises(ValueError, match=f"precision='{precision}'"):
        learner_for(BY_NAME["linear-9to15"], engine, precision=precision)


def test_unknown_precisions_and_backends():
    with pytest.raises(ValueError, match="precision='float16': expected one of"):
        learner_for(BY_NAME["linear-9to15"], "native", precision="float16")
    with pytest.raises(ValueError, match="has no tpu backend"):
        native(case("linear-9to15"), backend="tpu")


def test_rates_are_read_where_they_are():
    """A learned rate changes between prepared calls; nobody asks the host for it."""
    problem = BY_NAME["linear-9to15"]
    learner = learner_for(problem, "cpu_lockstep", learn_rates=True)
    tasks = problem.tasks(2)
    learner.backward(tasks, accumulate=False)
    before = [p.grad.clone() for p in learner.parameters()]
    with torch.no_grad():
        learner.rates.mul_(2)
    learner.backward(tasks, accumulate=False)
    other = learner_for(problem, "native", learn_rates=True, model=learner.model)
    with torch.no_grad():
        other.rates.copy_(learner.rates)
    got = [p.grad.clone() for p in learner.parameters()]
    other.backward(tasks, accumulate=False)
    want = [p.grad for p in other.parameters()]
    assert not torch.equal(got[0], before[0])
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
