"""Layers of the CUDA backend but for products, run by the emulation, against torch.

Linear and Conv2d are in test_cuda_products.py; losses and all else in
test_cuda_operations.py; whole networks in test_cuda_networks.py.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import emulated_layers as emulated
import pytest
import torch
from close import assert_close
from emulated_layers import Layer
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

DTYPES = (torch.float64, torch.float32)
EPS = 1e-3


def _images(function, *arguments):
    """A function of [N, C, H, W] for [N, H, W, C]."""
    return lambda x: function(x.permute(0, 3, 1, 2), *arguments).permute(0, 2, 3, 1)


def _normalized(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(axes, keepdim=True) + EPS).sqrt()


def _affine(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    x = x if w is None else x * w
    return x if b is None else x + b


def activation(kind, function, alpha=0.0, **options):
    shape = options.pop("shape", (3, 5, 7))
    return Layer(
        kind, shape, lambda x, w, b: function(x), shape, alpha=alpha, **options
    )


def batch_norm(
    height, width, channels, *, w=True, b=True, relu=False, mean=False, **options
):
    def function(x, scale, shift):
        y = _affine(_normalized(x, (0, 1, 2)), scale, shift)
        y = y.relu() if relu else y
        return y.mean((1, 2), keepdim=True) if mean else y

    shape = (height, width, channels)
    out = (1, 1, channels) if mean else shape
    counts = {"weight": w * channels, "bias": b * channels}
    options = {"name": "mean"} | options if mean else options
    return Layer(
        "batch_norm", shape, function, out, relu=relu, eps=EPS, **counts, **options
    )


def batch_norm_pool(
    height, width, channels, kernel, *, w=True, b=True, relu=True, **options
):
    pool = _images(F.max_pool2d, kernel)

    def function(x, scale, shift):
        y = pool(_affine(_normalized(x, (0, 1, 2)), scale, shift))
        return y.relu() if relu else y

    shape = (height, width, channels)
    out = (height // kernel[0], width // kernel[1], channels)
    counts = {"weight": w * channels, "bias": b * channels}
    windows = {"kernel": kernel, "stride": kernel}
    return Layer(
        "batch_norm_pool",
        shape,
        function,
        out,
        relu=relu,
        eps=EPS,
        name="x".join(map(str, kernel)),
        **counts,
        **windows,
        **options,
    )


def layer_norm(height, width, channels, *, w=True, b=True, **options):
    size = height * width * channels

    def function(x, scale, shift):
        return _affine(_normalized(x.flatten(1), (1,)), scale, shift).view(x.shape)

    shape = (height, width, channels)
    counts = {"weight": w * size, "bias": b * size}
    return Layer("layer_norm", shape, function, shape, eps=EPS, **counts, **options)


def pool(kind, height, width, channels, kernel, stride, padding, **options):
    function = F.max_pool2d if kind == "max_pool" else F.avg_pool2d
    image = _images(function, kernel, stride, padding)
    sizes = zip((height, width), kernel, stride, padding, strict=True)
    out = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
    return Layer(
        kind,
        (height, width, channels),
        lambda x, w, b: image(x),
        (*out, channels),
        kernel=kernel,
        stride=stride,
        padding=padding,
        name="-".join(f"{a}x{b}" for a, b in (kernel, stride, padding)),
        **options,
    )


def append(features, count, **options):
    return Layer(
        "append_parameter",
        (1, 1, features),
        lambda x, w, b: torch.cat([x, w.expand(*x.shape[:3], count)], 3),
        (1, 1, features + count),
        weight=count,
        **options,
    )


ACTIVATIONS = [
    activation("relu", F.relu),
    activation("leaky_relu", lambda x: F.leaky_relu(x, 0.3), 0.3),
    activation("tanh", torch.tanh),
    activation("sigmoid", torch.sigmoid),
    activation("silu", F.silu),
    activation("gelu", F.gelu),
    activation("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    activation("elu", lambda x: F.elu(x, 1.7), 1.7),
    activation("softplus", F.softplus),
    *(activation("tanh", torch.tanh, shape=(1, 1, n), samples=1) for n in (1, 2, 4, 5)),
    activation("silu", F.silu, shape=(4, 4, 33), samples=5, tasks=3),
]
# Around packs, lanes and blocks: 1024 rows are one launch, of 512 threads for 256 packs
# or more; 128 are a part, 16 parts a chunk.
NORMS = [
    batch_norm(1, 1, 1, samples=3, name="one"),
    batch_norm(1, 1, 5, samples=9, relu=True),
    batch_norm(2, 3, 8, tasks=3, relu=True),
    batch_norm(3, 3, 4, w=False, samples=5, relu=True, name="no-scale"),
    batch_norm(3, 3, 6, b=False, samples=5, name="no-shift"),
    batch_norm(3, 3, 3, w=False, b=False, name="plain"),
    batch_norm(4, 4, 17, samples=4, relu=True, shared=True, name="shared"),
    batch_norm(16, 16, 4, samples=2, relu=True),
    batch_norm(19, 27, 4, samples=1, relu=True),
    batch_norm(16, 17, 36, samples=3, relu=True),
    batch_norm(16, 16, 132, samples=4, tasks=1),
    batch_norm(25, 41, 4, samples=1, relu=True),
    batch_norm(18, 20, 36, samples=3, relu=True),
    batch_norm(40, 41, 3, samples=3, relu=True, tasks=1),
    batch_norm(2, 2, 8, samples=5, relu=True, mean=True),
    batch_norm(3, 5, 7, w=False, mean=True),
    batch_norm(19, 19, 4, relu=True, mean=True),
    batch_norm_pool(4, 4, 8, (2, 2)),
    batch_norm_pool(5, 7, 4, (2, 2), samples=4, tasks=3),
    batch_norm_pool(5, 7, 3, (2, 2), relu=False, samples=4),
    batch_norm_pool(6, 8, 5, (3, 2), samples=2),
    batch_norm_pool(7, 8, 4, (3, 3), samples=2, w=False),
    batch_norm_pool(4, 4, 4, (4, 4), samples=3, b=False),
    batch_norm_pool(3, 5, 16, (1, 1), samples=3, w=False, b=False),
    batch_norm_pool(4, 4, 20, (2, 2), samples=3, shared=True),
    batch_norm_pool(15, 23, 4, (2, 2), samples=2, tasks=1),
    batch_norm_pool(21, 23, 40, (2, 2), samples=2, tasks=1),
    batch_norm_pool(21, 25, 8, (2, 2), samples=2),
    batch_norm_pool(23, 23, 40, (2, 2), samples=2, tasks=1),
    layer_norm(1, 1, 1, samples=2),
    layer_norm(1, 1, 7, samples=5, tasks=3),
    layer_norm(1, 1, 300, samples=3, w=False),
    layer_norm(1, 1, 257, samples=2, b=False),
    layer_norm(3, 3, 5, samples=40, shared=True),
    layer_norm(1, 1, 16, samples=3, w=False, b=False),
]
WINDOWS = [
    ((2, 2), (2, 2), (0, 0)),
    ((3, 3), (2, 2), (1, 1)),
    ((3, 2), (1, 2), (0, 0)),
    ((3, 3), (1, 1), (1, 1)),
    ((2, 3), (2, 2), (0, 1)),
    ((2, 2), (3, 3), (1, 1)),
    ((5, 6), (5, 6), (0, 0)),
]
POOLS = [
    pool(kind, 5, 6, channels, *window)
    for kind in ("max_pool", "average_pool")
    for window, channels in zip(WINDOWS, (3, 4, 5, 8, 4, 1, 2), strict=True)
]
APPENDED = [
    append(1, 1),
    append(3, 2, samples=300, tasks=3),
    append(5, 4, shared=True, samples=7),
]
LAYERS = [*ACTIVATIONS, *NORMS, *POOLS, *APPENDED]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)
some_layers = pytest.mark.parametrize(
    "layer", [*ACTIVATIONS[5:6], *NORMS[:12:3], *NORMS[12::3], *POOLS[::4], APPENDED[1]]
)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("float64", "float32"))


@pytest.fixture(scope="module")
def driver(compiled):
    return emulated.build(compiled)


def bits(results: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}
    return {n: r.contiguous().view(whole[r.dtype]) for n, r in results.items()}


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    got, want = bits(got), bits(want)
    assert set(got) == set(want)
    for name, w in want.items():
        assert torch.equal(got[name], w), name


def check(got: dict[str, Tensor], want: dict[str, Tensor], layer, dtype) -> None:
    float_row = str(dtype).removeprefix("torch.")
    for name in got:
        kind = "product" if name in ("tdx", "tdw") else "pass"
        assert_close(
            {name: got[name]}, {name: want[name]}, f"{float_row} {kind}", layer
        )


@both_dtypes
@every_layer
def test_passes_are_those_of_torch(driver, layer, dtype):
    values = emulated.random_inputs(layer)
    got = emulated.run(driver, layer, values, dtype)
    assert len(got) == (6 if layer.param_count else 4)
    check(got, emulated.oracle(layer, values), str(layer), dtype)
    if dtype == torch.float64:
        for name, want in emulated.oracle(layer, values).items():
            torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-10)


@both_dtypes
@some_layers
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_memory_gives_the_same_bits(driver, layer, dtype, offset):
    values = emulated.random_inputs(layer)
    want = emulated.run(driver, layer, values, dtype)
    assert_same_bits(emulated.run(driver, layer, values, dtype, offset=offset), want)


@some_layers
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_order_of_threads_does_not_matter(driver, layer, seed):
    values = emulated.random_inputs(layer)
    want = emulated.run(driver, layer, values, torch.float32)
    assert_same_bits(
        emulated.run(driver, layer, values, torch.float32, seed=seed), want
    )


@some_layers
def test_a_task_gives_the_same_bits_alone(driver, layer):
    layer = replace(layer, tasks=3)
    values = emulated.random_inputs(layer)
    want = emulated.run(driver, layer, values, torch.float32)
    alone = replace(layer, tasks=1)
    for t in range(3):
        own = {
            n: v if layer.shared and n in ("w", "tw") else v[t : t + 1].clone()
            for n, v in values.items()
        }
        got = emulated.run(driver, alone, own, torch.float32)
        assert_same_bits(got, {n: w[t : t + 1] for n, w in want.items()})


@some_layers
@pytest.mark.parametrize("null", [("tx",), ("tw",), ("tx", "tw")], ids="+".join)
def test_a_null_tangent_is_zero(driver, layer, null):
    values = emulated.random_inputs(layer)
    for name in null:
        values[name] = torch.where(values[name].isnan(), values[name], 0.0)
    want = emulated.oracle(layer, values)
    got = emulated.run(driver, layer, values, torch.float64, without=null)
    check(got, want, str(layer), torch.float64)


@some_layers
@pytest.mark.parametrize("null", [("dx", "tdx"), ("dw", "tdw")], ids="+".join)
def test_a_null_output_is_not_computed(driver, layer, null):
    values = emulated.random_inputs(layer)
    want = emulated.run(driver, layer, values, torch.float64)
    got = emulated.run(driver, layer, values, torch.float64, without=null)
    assert_same_bits(got, {n: w for n, w in want.items() if n not in null})


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rows", [3, 900, 1100])
def test_batch_norm_of_far_away_data_keeps_its_variance(driver, rows, relu):
    layer = batch_norm(1, 1, 4, samples=rows, relu=relu)
    values = emulated.random_inputs(layer)
    values["x"] = (values["x"] + 1e4).float().double()
    want = emulated.oracle(layer, values)["y"]
    got = emulated.run(driver, layer, values, torch.float32)["y"]
    assert (got - want).abs().max() < 2e-2  # x itself is rounded to 5e-4


@pytest.mark.parametrize("kind", ["batch_norm", "max_pool"])
def test_not_a_number_reaches_the_output(driver, kind):
    layer = (
        batch_norm(3, 3, 4, relu=True)
        if kind == "batch_norm"
        else pool("max_pool", 4, 4, 4, (2, 2), (2, 2), (0, 0))
    )
    values = emulated.random_inputs(layer)
    values["x"][1, 2, 1, 1, 3] = float("nan")
    y = emulated.run(driver, layer, values, torch.float32)["y"]
    wrong = y.isnan()
    assert wrong[1, ..., 3].any() and not wrong[0].any() and not wrong[..., :3].any()


def test_pooled_norm_sends_the_gradient_to_the_first_of_equals(driver):
    layer = batch_norm_pool(2, 2, 4, (2, 2), samples=4, tasks=1, relu=False)
    values = emulated.random_inputs(layer)
    values["x"][0, 0] = values["x"][0, 0, 0, 0]
    values["w"][0, 0] = 0.0  # all of a channel are equal then
    check(
        emulated.run(driver, layer, values, torch.float64),
        emulated.oracle(layer, values),
        "ties",
        torch.float64,
    )


def test_too_many_tasks_are_refused(driver):
    layer = batch_norm(1, 1, 1, samples=1, tasks=70000)
    values = emulated.random_inputs(layer)
    with pytest.raises(RuntimeError, match="fewer than 65536 tasks, got 70000"):
        emulated.run(driver, layer, values, torch.float32)
