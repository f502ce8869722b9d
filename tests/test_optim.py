"""The C++ optimizers are torch's, to rounding, and take their place everywhere."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import fastmaml
from fastmaml import _native

pytestmark = pytest.mark.skipif(
    _native.unavailable() is not None, reason="the native engine is not built"
)

# one over the vector width, under it, a scalar, a matrix of several vectors
SHAPES = ((17,), (3, 5), (), (40, 40))
STEPS = 60

CASES = {
    "adam": ("Adam", {"lr": 1e-2}),
    "adam-decay": ("Adam", {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.5, 0.9)}),
    "adam-amsgrad": ("Adam", {"lr": 1e-2, "amsgrad": True, "eps": 1e-4}),
    "adam-maximize": ("Adam", {"lr": 1e-2, "maximize": True, "weight_decay": 0.01}),
    "adamw": ("AdamW", {"lr": 1e-2}),
    "adamw-decay": ("AdamW", {"lr": 1e-2, "weight_decay": 0.5, "amsgrad": True}),
    "sgd": ("SGD", {"lr": 0.05}),
    "sgd-decay": ("SGD", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    "sgd-momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": ("SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True}),
    "sgd-all": (
        "SGD",
        {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1, "maximize": True},
    ),
}
DTYPES = {torch.float32: 2e-5, torch.float64: 1e-12}
every_case = pytest.mark.parametrize("case", CASES)


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in SHAPES
    ]


def pair(case, dtype=torch.float32):
    """The same optimizer of ours and of torch, over equal parameters."""
    name, options = CASES[case]
    ours, theirs = parameters(dtype), parameters(dtype)
    return (
        (ours, getattr(fastmaml.optim, name)(ours, **options)),
        (theirs, getattr(torch.optim, name)(theirs, foreach=False, **options)),
    )


def gradients_for(step, params, dtype):
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        for p in params
    ]


def advance(params, optimizer, first, last, *, missing=()):
    """Steps with gradients that depend on the step alone, in new tensors each time."""
    for step in range(first, last):
        found = gradients_for(step, params, params[0].dtype)
        for i, (p, gradient) in enumerate(zip(params, found, strict=True)):
            p.grad = None if (step, i) in missing else gradient
        optimizer.step()


def assert_same(ours, theirs, bound=None):
    for a, b in zip(ours, theirs, strict=True):
        rtol = DTYPES[a.dtype] if bound is None else bound
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=rtol)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_steps_are_torchs(case, dtype):
    (ours, one), (theirs, other) = pair(case, dtype)
    before = [p.detach().clone() for p in ours]
    advance(ours, one, 0, STEPS)
    advance(theirs, other, 0, STEPS)
    assert_same(ours, theirs)
    assert all(not torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@every_case
def test_gradients_written_in_place_are_read_at_every_step(case):
    (ours, one), (theirs, other) = pair(case)
    for params, optimizer in ((ours, one), (theirs, other)):
        for p in params:
            p.grad = torch.zeros_like(p)
        for step in range(10):
            found = gradients_for(step, params, torch.float32)
            for p, gradient in zip(params, found, strict=True):
                p.grad.copy_(gradient)
            optimizer.step()
    assert_same(ours, theirs)


@every_case
@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_states_load_both_ways(case, direction):
    (ours, one), (theirs, other) = pair(case)
    source, target = ((ours, one), (theirs, other))
    if direction == "from torch":
        source, target = target, source
    advance(*source, 0, 20)
    file = io.BytesIO()
    torch.save(source[1].state_dict(), file)
    file.seek(0)
    target[1].load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for a, b in zip(target[0], source[0], strict=True):
            a.copy_(b)
    advance(*target, 20, 40)
    advance(*source, 20, 40)
    assert_same(target[0], source[0])
    kept, loaded = source[1].state_dict()["state"], target[1].state_dict()["state"]
    assert {k: set(v) for k, v in kept.items()} == {
        k: set(v) for k, v in loaded.items()
    }
    for k, entries in kept.items():
        for name, value in entries.items():
            torch.testing.assert_close(value, loaded[k][name], rtol=2e-5, atol=2e-5)


def test_entries_are_torchs_by_name():
    for case, names in (
        ("adam-amsgrad", {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        ("sgd-momentum", {"momentum_buffer"}),
    ):
        (ours, one), (theirs, other) = pair(case)
        advance(ours, one, 0, 3)
        advance(theirs, other, 0, 3)
        mine, torchs = one.state[ours[0]], other.state[theirs[0]]
        assert set(mine) == set(torchs) == names
        assert {n: (v.dtype, v.shape) for n, v in mine.items()} == {
            n: (v.dtype, v.shape) for n, v in torchs.items()
        }
        assert set(one.param_groups[0]) == set(other.param_groups[0])


def test_a_resumed_state_goes_on_bit_for_bit():
    params = parameters()
    optimizer = fastmaml.optim.Adam(params, 1e-2)
    advance(params, optimizer, 0, 10)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = fastmaml.optim.Adam(again, 1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(params, optimizer, 10, 20)
    advance(again, resumed, 10, 20)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize(
    "schedule",
    [lambda o: StepLR(o, 3, 0.5), lambda o: CosineAnnealingLR(o, 20)],
    ids=["step", "cosine"],
)
@every_case
def test_schedules_move_the_rate(case, schedule):
    (ours, one), (theirs, other) = pair(case)
    for params, optimizer in ((ours, one), (theirs, other)):
        plan = schedule(optimizer)
        for step in range(15):
            advance(params, optimizer, step, step + 1)
            plan.step()
    assert one.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert_same(ours, theirs)


@every_case
def test_parameters_without_a_gradient_stay(case):
    missing = {(step, i) for step in range(30) for i in range(4) if (step + i) % 3 == 0}
    missing |= {(step, 2) for step in range(12)}
    (ours, one), (theirs, other) = pair(case)
    advance(ours, one, 0, 30, missing=missing)
    advance(theirs, other, 0, 30, missing=missing)
    assert_same(ours, theirs)
    if "step" in one.state[ours[2]]:
        assert one.state[ours[2]]["step"] == other.state[theirs[2]]["step"] < 20


@every_case
def test_groups_have_settings_of_their_own(case):
    name, options = CASES[case]
    results = []
    for module in (fastmaml.optim, torch.optim):
        params = parameters()
        groups = [{"params": params[:2]}, {"params": params[2:3], "lr": 0.2}]
        optimizer = getattr(module, name)(groups, **options)
        advance(params[:3], optimizer, 0, 5)
        optimizer.add_param_group({"params": params[3:], "weight_decay": 0.3})
        advance(params, optimizer, 5, 15)
        optimizer.param_groups[0]["lr"] *= 0.1
        advance(params, optimizer, 15, 25)
        results.append(params)
    assert_same(*results)


def test_groups_may_mix_dtypes():
    results = []
    for module in (fastmaml.optim, torch.optim):
        params = [*parameters()[:2], *parameters(torch.float64)[2:]]
        optimizer = module.Adam(params, 1e-2)
        for step in range(5):
            for p in params:
                p.grad = gradients_for(step, [p], p.dtype)[0]
            optimizer.step()
        results.append(params)
    assert_same(*results)


@every_case
def test_moved_tensors_are_noticed(case):
    (ours, one), (theirs, other) = pair(case)
    for params, optimizer in ((ours, one), (theirs, other)):
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(3):
            optimizer.step()
        for p in params:  # the same objects, other memory
            p.data = p.data.clone()
            p.grad.data = torch.full_like(p, -0.5)
        for _ in range(3):
            optimizer.step()
        for entry in optimizer.state.values():
            for name, value in entry.items():
                if isinstance(value, torch.Tensor) and name != "step":
                    entry[name] = value / 2
        optimizer.step()
        for p, entry in optimizer.state.items():  # other entries
            optimizer.state[p] = {
                name: value * 3 if name != "step" and value is not None else value
                for name, value in entry.items()
            }
        optimizer.step()
    assert_same(ours, theirs)


def test_a_forgotten_state_begins_anew():
    (ours, one), (theirs, other) = pair("adam")
    for params, optimizer in ((ours, one), (theirs, other)):
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(3):
            optimizer.step()
        optimizer.state.clear()
        optimizer.step()
    assert_same(ours, theirs)
    assert one.state[ours[0]]["step"] == 1


@every_case
def test_channels_last_parameters_and_strided_gradients(case):
    name, options = CASES[case]
    results = []
    for module in (fastmaml.optim, torch.optim):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(4, 3, 5, 5, generator=generator)
        weight = nn.Parameter(weight.to(memory_format=torch.channels_last))
        matrix = nn.Parameter(torch.randn(6, 7, generator=generator))
        optimizer = getattr(module, name)([weight, matrix], **options)
        for _ in range(5):
            weight.grad = torch.randn(4, 3, 5, 5, generator=generator)
            matrix.grad = torch.randn(7, 6, generator=generator).t()
            optimizer.step()
        results.append([weight, matrix])
    assert_same(*results)


def test_learning_rates_may_be_tensors():
    (ours, one), (theirs, other) = pair("adam")
    for optimizer in (one, other):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.03)
    advance(ours, one, 0, 5)
    advance(theirs, other, 0, 5)
    assert_same(ours, theirs)


def test_closures_and_hooks_run():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = fastmaml.optim.SGD([p], 0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append("closure")
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert calls == ["before", "closure", "after"]
    assert p.item() == pytest.approx(3 - 0.1 * 6)


def test_zero_grad():
    p = nn.Parameter(torch.ones(3))
    optimizer = fastmaml.optim.Adam([p])
    p.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(p.grad, torch.zeros(3))
    optimizer.zero_grad()
    assert p.grad is None


def test_autograd_notices_that_a_parameter_changed():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = fastmaml.optim.SGD([p], 0.1)
    loss = p.square().sum()
    p.grad = torch.ones(1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_update_their_own_parameters():
    model = nn.Linear(3, 2)
    optimizer = fastmaml.optim.Adam(model.parameters(), 0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    for p in model_copy.parameters():
        p.grad = torch.ones_like(p)
    optimizer_copy.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert not any(map(torch.equal, model_copy.parameters(), before))


SPARSE = torch.eye(3).to_sparse()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
@pytest.mark.parametrize(
    ("tensor", "error", "words"),
    [
        (torch.zeros(3, dtype=torch.float16), TypeError, "is torch.float16"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "is torch.complex64"),
        (torch.zeros(3, device="meta"), ValueError, "is on meta, expected the CPU"),
        (torch.zeros(3, 4)[:, :2], ValueError, "gaps or overlaps"),
    ],
)
def test_refused_parameters_name_torchs_class(name, tensor, error, words):
    p = nn.Parameter(tensor)
    fine = nn.Parameter(torch.zeros(2))
    expected = rf"fastmaml.optim.{name}: parameter 1 of group 0.*{words}.*"
    with pytest.raises(error, match=rf"{expected}torch.optim.{name}"):
        getattr(fastmaml.optim, name)([fine, p], lr=0.1)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_refused_gradients(name):
    p = nn.Parameter(torch.zeros(3, 3))
    optimizer = getattr(fastmaml.optim, name)([p], lr=0.1)
    p.grad = SPARSE
    with pytest.raises(TypeError, match=r"gradient of parameter 0 .* is sparse"):
        optimizer.step()
    assert torch.equal(p, torch.zeros(3, 3))


def test_refused_settings_are_torchs():
    for options, words in (
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"betas": (1.0, 0.9)}, "Invalid beta"),
    ):
        with pytest.raises(ValueError, match=words):
            fastmaml.optim.Adam(parameters(), **options)
    with pytest.raises(ValueError, match="Nesterov"):
        fastmaml.optim.SGD(parameters(), 0.1, nesterov=True)


def test_a_state_of_another_model_is_refused():
    params = parameters()
    optimizer = fastmaml.optim.Adam(params)
    advance(params, optimizer, 0, 1)
    state = optimizer.state_dict()
    others = [nn.Parameter(torch.zeros(2)) for _ in params]
    wrong = fastmaml.optim.Adam(others)
    wrong.load_state_dict(state)
    for p in others:
        p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"state 'exp_avg' has shape \[17\]"):
        wrong.step()
