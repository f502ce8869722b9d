"""The paper's networks: sizes, starting values and batch normalisation."""

import pytest
import torch
from torch import nn

from fastmaml import models
from fastmaml.compile import compile_module

MODELS = {
    "sinusoid_mlp": (models.sinusoid_mlp, (6, 1), (6, 1), 1_761),
    "omniglot_conv": (lambda: models.omniglot_conv(5), (6, 1, 28, 28), (6, 5), 112_005),
    "omniglot_fc": (lambda: models.omniglot_fc(5), (6, 1, 28, 28), (6, 5), 247_109),
    "mini_imagenet_conv": (
        lambda: models.mini_imagenet_conv(5), (6, 3, 84, 84), (6, 5), 32_773,
    ),
    "gaussian_policy_mlp": (
        lambda: models.gaussian_policy_mlp(20, 6), (6, 20), (6, 12), 12_812,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_number_of_parameters(name):
    make, inputs, outputs, parameters = MODELS[name]
    model = make()
    assert model(torch.rand(inputs)).shape == outputs
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_models_are_sequentials_that_compile(name):
    model = MODELS[name][0]()
    assert isinstance(model, nn.Sequential) and not list(model.buffers())
    report = compile_module(model, "mse")
    assert report.reasons == []
    norms = [x for x in report.program.layers if x.kind == "batch_norm"]
    assert {n.name for n in norms} == {
        n.removesuffix(".bias") for n in models.batch_norm_parameters(model)
    }
    assert all(n.parameters == (None, f"{n.name}.bias") for n in norms)


def test_omniglot_conv_halves_28_four_times():
    model, x, sizes = models.omniglot_conv(5), torch.rand(2, 1, 28, 28), []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            sizes.append(x.shape[2:])
    assert sizes == [(14, 14), (7, 7), (4, 4), (2, 2)]


@pytest.mark.parametrize("make", [models.sinusoid_mlp, lambda: models.omniglot_fc(5)])
def test_mlps_start_from_the_truncated_normal(make):
    linears = [layer for layer in make() if isinstance(layer, nn.Linear)]
    weights = torch.cat([layer.weight.flatten() for layer in linears])
    assert weights.abs().max() <= 0.02
    # A normal cut at two deviations has 0.88 of the deviation.
    torch.testing.assert_close(weights.std().item(), 0.0088, rtol=0.05, atol=0)
    assert all((layer.bias == 0).all() for layer in linears)


def test_omniglot_conv_head_starts_from_the_unit_normal():
    head = models.omniglot_conv(200)[-1]
    torch.testing.assert_close(head.weight.std().item(), 1.0, rtol=0.05, atol=0)
    assert (head.bias == 0).all()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (models.CentreBatchNorm1d(4), (16, 4)),
        (models.CentreBatchNorm2d(4), (3, 4, 5, 5)),
    ],
)
def test_batch_norm_uses_the_batch_in_training_and_test_and_only_centres(norm, shape):
    x = torch.randn(shape) * 3 + 2
    assert [name for name, _ in norm.named_parameters()] == ["bias"]
    assert norm.weight is None
    with torch.no_grad():
        norm.bias += 5
    axes = [axis for axis in range(len(shape)) if axis != 1]
    variance = x.var(axes, keepdim=True, unbiased=False)
    expected = (x - x.mean(axes, keepdim=True)) / (variance + 1e-3).sqrt() + 5
    for model in (norm.train(), norm.eval()):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    norm.reset_parameters()
    assert (norm.bias == 0).all()


def test_batch_norm_parameters_are_named():
    model = nn.Sequential(models.omniglot_conv(5), nn.BatchNorm1d(5), nn.LayerNorm(5))
    names = models.batch_norm_parameters(model)
    inner = {f"0.{i}.bias" for i in (1, 4, 7, 10)}
    assert names == inner | {"1.weight", "1.bias"}
    assert names <= dict(model.named_parameters()).keys()
    assert models.batch_norm_parameters(nn.BatchNorm1d(3)) == {"weight", "bias"}
    assert models.batch_norm_parameters(models.sinusoid_mlp()) == set()


def test_policy_appends_the_same_log_std_to_every_state():
    policy = models.gaussian_policy_mlp(3, 2, hidden=(8,), log_std=-0.5)
    out = policy(torch.randn(5, 3))
    assert torch.equal(out[:, 2:], torch.full((5, 2), -0.5))
    assert policy[-1].size == 2 and policy[-1].value.shape == (2,)
    out[:, 2:].sum().backward()
    assert torch.equal(policy[-1].value.grad, torch.full((2,), 5.0))
    kinds = [type(layer).__name__ for layer in policy]
    assert kinds == ["Linear", "ReLU", "Linear", "AppendParameter"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: models.gaussian_policy_mlp(3, 2, activation="gelu"), "activation"),
        (lambda: models.mini_imagenet_conv(5, size=15), "size must be at least 16"),
    ],
)
def test_refuses(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_models_run_under_vmap_over_tasks():
    model = models.omniglot_conv(5, channels=8)
    params = {k: torch.stack([v, v + 0.1]) for k, v in model.named_parameters()}
    x = torch.rand(2, 4, 1, 28, 28)
    call = torch.func.functional_call
    batched = torch.func.vmap(lambda p, x: call(model, p, (x,)))(params, x)
    single = call(model, {k: v[1] for k, v in params.items()}, (x[1],))
    torch.testing.assert_close(batched[1], single, rtol=1e-4, atol=1e-5)
