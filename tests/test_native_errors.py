"""Bad input is refused at the door, by name: got, expected, what to do."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from native_cases import Watched, case, cast, native, says

from fastmaml import _native
from fastmaml.engines import Rates
from fastmaml.tasks import TaskBatch

LABELLED, FITTED = "cross-entropy-5-n5-mean", "linear-9to15"


def at_the_door() -> Watched:
    """The extension, which no bad call may reach."""

    def refuse(arguments: tuple) -> tuple:
        raise AssertionError("the call reached the extension")

    return Watched(refuse)


def calls(
    c,
    x=None,
    y=None,
    params=None,
    vector=None,
    rates=None,
    steps=1,
    closed: bool = True,
) -> dict:
    """Every call of the engine, by name, with some of its arguments replaced.

    ``closed``: the call must not reach the extension.
    """
    engine = native(c)
    if closed:
        engine._core = at_the_door()
    x = c.tasks.support_x if x is None else x
    y = c.tasks.support_y if y is None else y
    params = params or c.own
    vector = c.vector if vector is None else vector
    rates = rates or c.rates
    return {
        "forward": lambda: engine.forward(params, x),
        "value_and_grad": lambda: engine.value_and_grad(params, x, y),
        "hvp": lambda: engine.hvp(params, x, y, vector),
        "gauss_newton_product": lambda: engine.gauss_newton_product(
            params, x, y, vector
        ),
        "adapt": lambda: engine.adapt(params, rates, x, y, steps=steps),
        "evaluate": lambda: engine.evaluate(params, rates, c.tasks, steps=steps),
        "meta_gradient": lambda: engine.meta_gradient(
            params, rates, c.tasks, steps=steps, rate_gradient=True
        ),
    }


TAKE_X = ["forward", "value_and_grad", "hvp", "gauss_newton_product", "adapt"]
TAKE_Y = TAKE_X[1:]
TAKE_RATES = ["adapt", "evaluate", "meta_gradient"]
TAKE_VECTOR = ["hvp", "gauss_newton_product"]


def which(call: str, name: str) -> str:
    return f"support_{name}" if call == "adapt" else name


# -- samples ---------------------------------------------------------------------------


@pytest.mark.parametrize("call", TAKE_X)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_inputs_of_another_dtype(call, dtype):
    c = case(FITTED)
    bad = c.tasks.support_x.to(dtype)
    wanted = f"expected torch.float64, got {dtype}; convert"
    with pytest.raises(TypeError, match=says(which(call, "x") + ":", wanted)):
        calls(c, x=bad)[call]()


@pytest.mark.parametrize("call", TAKE_Y)
@pytest.mark.parametrize("name", [FITTED, LABELLED])
def test_targets_of_another_dtype(call, name):
    c = case(name)
    bad = c.tasks.support_y.to(torch.int32)
    wanted = torch.int64 if name == LABELLED else torch.float64
    text = f"expected {wanted}, got torch.int32; convert"
    with pytest.raises(TypeError, match=says(which(call, "y") + ":", text)):
        calls(c, y=bad)[call]()


@pytest.mark.parametrize("call", TAKE_Y)
def test_targets_of_another_shape(call):
    c = case(FITTED)
    y = c.tasks.support_y
    for bad in (y[..., :1], y[:, 1:], y[:1], y[..., 0], y.repeat(1, 1, 2)):
        text = f"expected shape {list(y.shape)}, got {list(bad.shape)}"
        with pytest.raises(ValueError, match=says(which(call, "y") + ":", text)):
            calls(c, y=bad)[call]()


@pytest.mark.parametrize("half", ["support_y", "query_y"])
def test_halves_are_named(half):
    c = case(FITTED)
    fields = {n: getattr(c.tasks, n) for n in ("support_y", "query_y")}
    narrow = {n: y[..., :1] for n, y in fields.items()}
    tasks = dataclasses.replace(c.tasks, **narrow)
    engine = native(c)
    with pytest.raises(ValueError, match="support_y: expected shape"):
        engine.meta_gradient(c.params, c.rates, tasks, steps=1)
    labelled = case(LABELLED)
    tasks = labelled.tasks
    labels = {half: getattr(tasks, half) + 5}
    bad = dataclasses.replace(tasks, **labels)
    engine = native(labelled)
    for call in (engine.meta_gradient, engine.evaluate):
        with pytest.raises(ValueError, match=f"{half}: expected labels from 0 to 4"):
            call(labelled.params, labelled.rates, bad, steps=1)


@pytest.mark.parametrize("call", TAKE_Y)
@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**63)])
def test_labels_out_of_range(call, label):
    c = case(LABELLED)
    y = c.tasks.support_y.clone()
    y[1, 3] = label
    text = which(call, "y") + ": expected labels from 0 to 4", "5 outputs", f"{label}"
    with pytest.raises(ValueError, match=says(*text, "sample 3 of task 1")):
        calls(c, y=y, closed=False)[call]()


@pytest.mark.parametrize("loss", ["policy_gradient", "likelihood_ratio"])
@pytest.mark.parametrize("action", [-1.0, 5.0, 0.5, math.nan, math.inf])
def test_categorical_actions_out_of_range(loss, action):
    c = case(f"categorical-{loss.replace('_', '-')}-5")
    y = c.tasks.support_y.clone()
    y[1, 3, 0] = action
    text = "y: expected actions from 0 to 4", "5 outputs", f"{action:g}"
    with pytest.raises(ValueError, match=says(*text, "sample 3 of task 1")):
        native(c).value_and_grad(c.params, c.tasks.support_x, y)


@pytest.mark.parametrize("call", TAKE_X)
def test_no_samples(call):
    c = case(FITTED)
    x, y = c.tasks.support_x[:, :0], c.tasks.support_y[:, :0]
    with pytest.raises(ValueError, match=says(which(call, "x"), "sample")):
        calls(c, x=x, y=y)[call]()


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_tensors_elsewhere(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; tensors on meta take the same path")
    c = case(FITTED)
    x, y = c.tasks.support_x.to(device), c.tasks.support_y.to(device)
    text = f"expected a tensor on the CPU, got one on {device}", ".cpu()"
    params = {n: p.to(device) for n, p in c.own.items()}
    vector = {n: v.to(device) for n, v in c.vector.items()}
    rates = dataclasses.replace(c.rates, values=c.rates.values.to(device))
    for bad, name in (
        (calls(c, x=x)["forward"], "x:"),
        (calls(c, y=y)["hvp"], "y:"),
        (calls(c, params=params)["value_and_grad"], "0.weight:"),
        (calls(c, vector=vector)["hvp"], "0.weight:"),
        (calls(c, rates=rates)["adapt"], "rates:"),
    ):
        with pytest.raises(ValueError, match=says(name, *text)):
            bad()


# -- parameters and vectors ------------------------------------------------------------


@pytest.mark.parametrize("call", [*TAKE_X, "evaluate", "meta_gradient"])
def test_parameters_that_do_not_fit(call):
    c = case(FITTED)
    half = cast(c.own, torch.float16)
    with pytest.raises(TypeError, match=says("params", "float32 or", "got", "float16")):
        calls(c, params=half)[call]()
    mixed = {**c.own, "0.bias": c.own["0.bias"].float()}
    with pytest.raises(TypeError, match=says("0.bias: expected torch.float64, got")):
        calls(c, params=mixed)[call]()
    short = {**c.own, "0.bias": c.own["0.bias"][:, 1:]}
    with pytest.raises(ValueError, match=says("0.bias: expected", "15], got [2, 14]")):
        calls(c, params=short)[call]()
    part_shared = {**c.own, "0.bias": c.params["0.bias"]}
    with pytest.raises(ValueError, match=says("0.bias: expected shape [2, 15], got [")):
        calls(c, params=part_shared)[call]()
    three = {n: p[[0, 1, 1]] for n, p in c.own.items()}
    with pytest.raises(ValueError, match=says("0.weight: expected shape [2,", "[3,")):
        calls(c, params=three)[call]()


@pytest.mark.parametrize("missing", ["0.weight", "0.bias"])
@pytest.mark.parametrize("call", TAKE_VECTOR)
def test_missing_parameters_are_named(call, missing):
    c = case(FITTED)
    without = {n: p for n, p in c.own.items() if n != missing}
    for bad in (calls(c, params=without), calls(c, vector=without)):
        with pytest.raises((KeyError, ValueError), match=re.escape(missing)):
            bad[call]()


@pytest.mark.parametrize("call", TAKE_VECTOR)
def test_an_empty_vector_is_no_vector(call):
    with pytest.raises((KeyError, ValueError), match=says("0.weight")):
        calls(case(FITTED), vector={})[call]()


@pytest.mark.parametrize("call", TAKE_VECTOR)
def test_vectors_that_do_not_fit(call):
    c = case(FITTED)
    with pytest.raises(TypeError, match="expected torch.float64, got torch.float32"):
        calls(c, vector=cast(c.vector, torch.float32))[call]()
    wide = {n: v.repeat(2, *[1] * (v.dim() - 1)) for n, v in c.vector.items()}
    with pytest.raises(ValueError, match=says("0.weight: expected shape [2,", "[4,")):
        calls(c, vector=wide)[call]()


# -- rates, steps, options -------------------------------------------------------------


def rates(values, layout="scalar", per_step=False) -> Rates:
    return Rates(torch.as_tensor(values, dtype=torch.float64), layout, per_step)


@pytest.mark.parametrize("call", TAKE_RATES)
def test_rates_that_do_not_fit(call):
    c = case(FITTED)
    for bad, expected, got in (
        (rates([0.1, 0.2, 0.3], "per_tensor"), "4 values", "got 3"),
        (rates([0.1, 0.2]), "1 values", "got 2"),
        (rates([[0.1] * 5] * 2, "per_tensor", True), "8 values", "got 10"),
        (rates([0.1] * 4, "per_parameter"), "values for layout 'per_parameter'", "4"),
    ):
        with pytest.raises(ValueError, match=says("rates: expected", expected, got)):
            calls(c, rates=bad)[call]()


@pytest.mark.parametrize("call", TAKE_RATES)
def test_rates_per_step_without_a_row(call):
    c = case(FITTED)
    for bad in (
        rates([], "scalar", True),
        rates(torch.zeros(0, 4), "per_tensor", True),
    ):
        with pytest.raises(ValueError, match="rates"):
            calls(c, rates=bad)[call]()


@pytest.mark.parametrize("call", TAKE_RATES)
def test_negative_steps(call):
    with pytest.raises(ValueError, match="steps=-1: expected 0 or more"):
        calls(case(FITTED), steps=-1)[call]()


@pytest.mark.parametrize("weights", [[], [1], [1, 2, 3, 4]], ids=str)
def test_loss_weights_of_another_length(weights):
    c = case(FITTED)
    text = f"loss_weights: got {len(weights)} weights", "2 steps, 3 in all"
    with pytest.raises(ValueError, match=says(*text)):
        native(c).meta_gradient(
            c.params, c.rates, c.tasks, steps=2, loss_weights=weights
        )


def test_unknown_memory():
    text = "memory='much': expected one of", "'auto'", "'keep'", "'recompute'"
    with pytest.raises(ValueError, match=says(*text)):
        native(case(FITTED), memory="much")


def test_unknown_instruction_set():
    names = _native.core().build_info()["isas"]
    with pytest.raises(ValueError, match=says("instruction set", *names, "'sse9'")):
        _native.core().use_isa("sse9")


def test_an_error_leaves_the_engine_as_it_was():
    c = case(LABELLED)
    engine = native(c)
    want = engine.meta_gradient(c.params, c.rates, c.tasks, steps=1)
    t = c.tasks
    bad = TaskBatch(t.support_x, t.support_y + 5, t.query_x, t.query_y)
    with pytest.raises(ValueError, match="support_y"):
        engine.meta_gradient(c.params, c.rates, bad, steps=1)
    got = engine.meta_gradient(c.params, c.rates, t, steps=1)
    assert torch.equal(got.loss, want.loss)
