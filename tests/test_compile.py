"""The compile step: programs for straight lines, a reason for everything else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from fastmaml import models
from fastmaml.compile import LayerSpec, compile_module
from fastmaml.losses import mse


def layers_of(model, loss="mse", reduction="mean"):
    report = compile_module(model, loss, reduction)
    assert report.program is not None, str(report)
    return report.program.layers


def kinds_of(model):
    return [layer.kind for layer in layers_of(model)]


def reasons_of(model, loss="mse"):
    report = compile_module(model, loss)
    assert report.program is None and not report.native
    return "\n".join(report.reasons)


class Calls(nn.Module):
    """A forward pass given as a function of the module and its input."""

    def __init__(self, body, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def calls(body):
    """The body between two linear layers."""
    return Calls(lambda m, x: m.b(body(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))


def images(body):
    """The body behind a convolution of [N, 1, 6, 6] to [N, 3, 4, 4]."""
    return Calls(lambda m, x: body(m.c(x)), c=nn.Conv2d(1, 3, 3))


def test_attributes_and_names_of_the_paper_network():
    layers = layers_of(models.omniglot_conv(5, channels=8), "cross_entropy")
    assert layers[0] == LayerSpec(
        "conv2d",
        "0",
        {
            "in_channels": 1,
            "out_channels": 8,
            "kernel": (3, 3),
            "stride": (2, 2),
            "padding": (1, 1),
            "bias": True,
        },
        ("0.weight", "0.bias"),
    )
    assert layers[1] == LayerSpec(
        "batch_norm",
        "1",
        {"features": 8, "eps": 1e-3, "scale": False, "shift": True},
        (None, "1.bias"),
    )
    assert layers[-1].attributes == {"in_features": 8, "out_features": 5, "bias": True}


def test_parameters_of_a_program_are_those_of_the_model():
    model = models.gaussian_policy_mlp(4, 2)
    program = compile_module(model, "policy_gradient").program
    assert list(program.parameters) == [n for n, _ in model.named_parameters()]
    assert program.layers[-1].parameters == ("5.value",)
    assert program.layers[-1].attributes == {"size": 2}


@pytest.mark.parametrize("reduction", ["mean", "sum_over_ways"])
def test_loss_of_a_program(reduction):
    program = compile_module(nn.Linear(2, 3), "cross_entropy", reduction).program
    assert (program.loss.kind, program.loss.reduction) == ("cross_entropy", reduction)


def test_single_layer_and_nested_names():
    assert layers_of(nn.Linear(2, 3))[0].parameters == ("weight", "bias")
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 3, bias=False)), nn.Tanh())
    layers = layers_of(nested)
    assert [layer.name for layer in layers] == ["0.0", "1"]
    assert layers[0].parameters == ("0.0.weight", None)


@pytest.mark.parametrize(
    ("body", "kind", "attributes"),
    [
        (F.relu, "relu", {}),
        (torch.relu, "relu", {}),
        (lambda x: x.relu(), "relu", {}),
        (lambda x: F.relu(x, inplace=True), "relu", {}),
        (torch.tanh, "tanh", {}),
        (lambda x: x.tanh(), "tanh", {}),
        (torch.sigmoid, "sigmoid", {}),
        (lambda x: x.sigmoid(), "sigmoid", {}),
        (F.gelu, "gelu", {}),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh", {}),
        (F.silu, "silu", {}),
        (F.leaky_relu, "leaky_relu", {"slope": 0.01}),
        (lambda x: F.leaky_relu(x, 0.2), "leaky_relu", {"slope": 0.2}),
        (F.elu, "elu", {"alpha": 1.0}),
        (lambda x: F.elu(input=x, alpha=2.0), "elu", {"alpha": 2.0}),
        (F.softplus, "softplus", {}),
    ],
)
def test_activation_calls(body, kind, attributes):
    layers = layers_of(calls(body))
    assert [layer.kind for layer in layers] == ["linear", kind, "linear"]
    assert layers[1].attributes == attributes


@pytest.mark.parametrize(
    ("module", "kind", "attributes"),
    [
        (nn.GELU(), "gelu", {}),
        (nn.GELU("tanh"), "gelu_tanh", {}),
        (nn.LeakyReLU(0.3), "leaky_relu", {"slope": 0.3}),
        (nn.ELU(1.5), "elu", {"alpha": 1.5}),
        (nn.Softplus(), "softplus", {}),
        (nn.LayerNorm(4), "layer_norm", {"shape": (4,), "scale": True, "shift": True}),
        (nn.SiLU(inplace=True), "silu", {}),
    ],
)
def test_activation_and_norm_modules(module, kind, attributes):
    layer = layers_of(nn.Sequential(nn.Linear(4, 4), module))[1]
    assert layer.kind == kind
    assert attributes.items() <= layer.attributes.items()


WINDOW = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}


@pytest.mark.parametrize(
    ("body", "kinds", "attributes"),
    [
        (lambda x: F.max_pool2d(x, 3, 2, 1), ["max_pool2d"], WINDOW),
        (lambda x: F.avg_pool2d(x, 3, stride=2, padding=1), ["avg_pool2d"], WINDOW),
        (lambda x: F.max_pool2d(x, 2), ["max_pool2d"], {"stride": (2, 2)}),
        (lambda x: F.adaptive_avg_pool2d(x, 1), ["global_avg_pool"], {}),
        (lambda x: F.adaptive_avg_pool2d(x, (1, 1)), ["global_avg_pool"], {}),
        (lambda x: x.mean((2, 3)), ["global_avg_pool", "flatten"], {}),
        (lambda x: x.mean([-2, -1]), ["global_avg_pool", "flatten"], {}),
        (lambda x: torch.mean(x, (3, 2), keepdim=True), ["global_avg_pool"], {}),
        (lambda x: torch.flatten(x, 1), ["flatten"], {}),
        (lambda x: x.flatten(1), ["flatten"], {}),
        (lambda x: x.flatten(start_dim=1), ["flatten"], {}),
        (lambda x: x.view(x.size(0), -1), ["flatten"], {}),
        (lambda x: x.reshape(x.shape[0], -1), ["flatten"], {}),
        (lambda x: torch.reshape(x, (x.shape[0], -1)), ["flatten"], {}),
        (lambda x: x.contiguous(), [], {}),
        (lambda x: F.dropout(x, 0.0), [], {}),
    ],
)
def test_image_calls(body, kinds, attributes):
    layers = layers_of(images(body))
    assert [layer.kind for layer in layers] == ["conv2d", *kinds]
    assert attributes.items() <= layers[-1].attributes.items()


def test_modules_that_change_nothing_vanish():
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Dropout(0.0))
    assert kinds_of(model) == ["linear"]
    assert kinds_of(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()) == [
        "linear"
    ]


def test_named_padding():
    same = layers_of(nn.Conv2d(1, 2, (3, 5), padding="same"))[0]
    assert same.attributes["padding"] == (1, 2)
    assert "even kernel" in reasons_of(nn.Conv2d(1, 2, 2, padding="same"))


def test_appended_parameter_written_out():
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Linear(3, 2)
            self.log_std = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            mean = self.mean(x)
            return torch.cat([mean, self.log_std.expand_as(mean)], dim=-1)

    layers = layers_of(Policy(), "policy_gradient")
    assert [layer.kind for layer in layers] == ["linear", "append_parameter"]
    assert layers[1].parameters == ("log_std",)


def test_subclass_without_a_forward_of_its_own_is_its_base():
    class Mine(nn.Linear):
        pass

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert kinds_of(nn.Sequential(Mine(2, 2))) == ["linear"]
    assert "linear has no native layer" in reasons_of(nn.Sequential(Scaled(2, 2)))


def _hooked():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda *a: None)
    return model


def _parametrized():
    model = nn.Sequential(nn.Linear(2, 2))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


def _patched():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].forward = lambda x: x
    return model


def _tied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


def _frozen():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    return model


class TwoInputs(nn.Linear):
    def forward(self, x, y):
        return super().forward(x) * y


class Branches(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


REFUSED = {
    "hooks": (_hooked(), ["0 (Linear) has hooks"]),
    "parametrized": (_parametrized(), ["0 (ParametrizedLinear) is parametrized"]),
    "patched": (_patched(), ["0 (Linear) has a forward function patched"]),
    "tied": (_tied(), ["1.weight is tied to 0.weight"]),
    "frozen": (_frozen(), ["parameter 0.bias is frozen"]),
    "half": (nn.Linear(2, 2).half(), ["parameters are float16"]),
    "mixed": (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), ["float64"]),
    "lazy": (nn.LazyLinear(2), ["lazy parameters"]),
    "nothing to train": (nn.Tanh(), ["no trainable parameters"]),
    "residual": (calls(lambda x: x + torch.relu(x)), ["residual sums"]),
    "branch": (calls(lambda x: torch.relu(x) * 0 + x), ["no native layer"]),
    "control flow": (nn.Sequential(Branches(2, 2)), ["0 (Branches)", "torch.fx"]),
    "two inputs": (TwoInputs(2, 2), ["more than one input: y"]),
    "repeated": (
        Calls(lambda m, x: m.a(m.a(x)), a=nn.Linear(2, 2)),
        ["module a is called 2 times"],
    ),
    "unused": (
        Calls(lambda m, x: m.a(x), a=nn.Linear(2, 2), b=nn.Linear(2, 2)),
        ["b.weight is not used", "b.bias is not used"],
    ),
    "earlier result": (
        Calls(lambda m, x: (m.a(x), m.b(x))[1], a=nn.Linear(2, 2), b=nn.Linear(2, 2)),
        ["module b takes x instead of the result before it"],
    ),
    "returns an earlier result": (
        calls(lambda x: (torch.relu(x), x)[1]),
        ["module b takes a instead"],
    ),
    "ignores its last result": (
        Calls(lambda m, x: (x, m.a(x))[0], a=nn.Linear(2, 2)),
        ["returns x, not its last result"],
    ),
    "two outputs": (
        Calls(lambda m, x: (m.a(x), x), a=nn.Linear(2, 2)),
        ["more than one tensor"],
    ),
    "groups": (nn.Conv2d(4, 4, 3, groups=2), ["has groups=2"]),
    "dilation": (nn.Conv2d(1, 1, 3, dilation=2), ["dilation=(2, 2)"]),
    "padding mode": (
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
        ["padding_mode='circular'"],
    ),
    "running statistics": (
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(),
        ["1 (BatchNorm1d) uses running statistics", "batch_norm='batch'"],
    ),
    "dropout": (
        nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.4)),
        ["1 (dropout) draws masks with p=0.4"],
    ),
    "softplus": (
        nn.Sequential(nn.Linear(2, 2), nn.Softplus(beta=2)),
        ["beta=2"],
    ),
    "ceil mode": (images(lambda x: F.max_pool2d(x, 2, ceil_mode=True)), ["ceil_mode"]),
    "padding not counted": (
        images(lambda x: F.avg_pool2d(x, 2, padding=1, count_include_pad=False)),
        ["count_include_pad"],
    ),
    "pool dilation": (images(lambda x: F.max_pool2d(x, 2, dilation=2)), ["dilation=2"]),
    "coarse adaptive pool": (
        images(lambda x: F.adaptive_avg_pool2d(x, 2)),
        ["output_size=2"],
    ),
    "computed option": (
        Calls(lambda m, x: F.leaky_relu(m.a(x), m.a.bias[0]), a=nn.Linear(2, 2)),
        ["no native layer"],
    ),
    "computed slope": (
        calls(lambda x: F.leaky_relu(x, x.size(1))),
        ["computed negative_slope"],
    ),
    "other mean": (images(lambda x: x.mean(1)), ["mean over space"]),
    "other flatten": (images(lambda x: x.flatten(2)), ["dimensions 2 to -1"]),
    "other view": (images(lambda x: x.view(-1, 48)), ["is no flattening"]),
    "other cat": (images(lambda x: torch.cat([x, x], 1)), ["joins tensors"]),
    "unknown module": (nn.Sequential(nn.GRUCell(2, 2)), ["0 (GRUCell) has no native"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reasons(name):
    model, expected = REFUSED[name]
    reasons = reasons_of(model)
    for part in expected:
        assert part in reasons


def test_every_reason_is_listed():
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, groups=2), nn.Dropout(0.5), nn.Softplus(beta=3)
    )
    report = compile_module(model, mse)
    assert len(report.reasons) == 4
    assert "callable" in report.reasons[0]


def test_report_prints_layers_or_reasons():
    text = str(compile_module(nn.Sequential(nn.Linear(2, 3), nn.Tanh())))
    assert "native program, 2 layers" in text
    assert "linear(in_features=2, out_features=3, bias=True)  0" in text
    assert "loss: mse (mean)" in text
    text = str(compile_module(nn.Sequential(nn.GRUCell(2, 2))))
    assert "functional engine" in text and "GRUCell" in text


def test_compiling_leaves_the_model_alone():
    model = models.omniglot_conv(5, channels=4)
    before = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    compile_module(model, "cross_entropy")
    assert all(
        id(p) == before[n][0] and torch.equal(p, before[n][1])
        for n, p in model.named_parameters()
    )
    assert model.training


def test_unknown_losses_raise():
    with pytest.raises(ValueError, match="'hinge'"):
        compile_module(nn.Linear(2, 2), "hinge")
    with pytest.raises(ValueError, match="sum_over_ways"):
        compile_module(nn.Linear(2, 2), "mse", "sum_over_ways")
