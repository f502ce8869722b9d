"""Losses, vector operations and optimizers of the CUDA backend, emulated."""

from __future__ import annotations

import itertools
import math
import shutil

import emulated_layers as emulated
import pytest
import torch
from emulated_layers import Memory
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

DTYPES = (torch.float64, torch.float32)
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-6)}
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("float64", "float32"))


@pytest.fixture(scope="module")
def driver(compiled):
    return emulated.build(compiled)


def double(dtype) -> int:
    return int(dtype == torch.float64)


def close(got, want, dtype):
    relative, absolute = BOUNDS[dtype]
    torch.testing.assert_close(got.double(), want, rtol=relative, atol=absolute)


# -- losses ----------------------------------------------------------------------------


def _policy(z, target):
    actions = z.shape[-1] // 2
    mean, log_std = z.split(actions, -1)
    law = torch.distributions.Normal(mean, log_std.exp())
    return -(target[..., -1] * law.log_prob(target[..., :-1]).sum(-1)).sum(-1)


LOSSES = {
    0: lambda z, y: (z - y).square().sum((-1, -2)),
    1: lambda z, y: F.cross_entropy(z.mT, y, reduction="none").sum(-1),
    2: _policy,
}


def loss_case(kind, tasks, samples, outputs):
    z, tz = (torch.randn(tasks, samples, outputs).double() for _ in range(2))
    if kind == 1:
        return z, torch.randint(outputs, (tasks, samples)), tz
    size = outputs if kind == 0 else outputs // 2 + 1
    return z, torch.randn(tasks, samples, size).double(), tz


def run_loss(driver, kind, dtype, z, target, tz, scale, *, stride=3, gradient=True):
    memory, values = Memory(dtype, 1), Memory(torch.float64)
    room = Memory(dtype)  # on a cache line, as the engine's scratch
    tasks, samples, outputs = z.shape
    typed = target if kind == 1 else memory.put(target.to(dtype))
    put = [memory.put(v.to(dtype)) for v in (z, tz)]
    dz, tdz = (memory.empty(z.numel()).view(z.shape) for _ in range(2))
    value, accuracy = (values.empty(tasks * stride) for _ in range(2))
    sizes = (double(dtype), tasks, samples, outputs, scale)
    given = dz if gradient else None
    scratch = room.empty(tasks * driver.library.loss_scratch_elements(samples))
    rest = (put[0], typed, put[1], given, tdz, value, accuracy, stride, scratch)
    for hessian in (0, 1):
        driver.call("loss", kind, hessian, *sizes, *rest)
    for one in (memory, values, room):
        one.check()
    rows = value.view(tasks, stride), accuracy.view(tasks, stride)
    assert all(r[:, 1:].isnan().all() for r in rows)
    return rows[0][:, 0], rows[1][:, 0], dz, tdz


@both_dtypes
@pytest.mark.parametrize(
    ("kind", "outputs"), [*itertools.product(LOSSES, (2, 6)), (0, 70), (1, 3), (1, 70)]
)
@pytest.mark.parametrize("samples", [1, 7, 300])
def test_losses_are_those_of_torch(driver, kind, samples, outputs, dtype):
    scale = 0.37
    z, y, tz = loss_case(kind, 3, samples, outputs)
    z, tz = z.float().double(), tz.float().double()
    y = y if kind == 1 else y.float().double()

    def function(z):
        return scale * LOSSES[kind](z, y)

    gradient = torch.func.grad(lambda z: function(z).sum())
    want, hessian = torch.func.jvp(gradient, (z,), (tz,))
    value, accuracy, dz, tdz = run_loss(driver, kind, dtype, z, y, tz, scale)
    torch.testing.assert_close(value, function(z), rtol=1e-5, atol=1e-5)
    close(dz, want, dtype)
    close(tdz, hessian, dtype)
    if kind == 1:
        hits = (z.argmax(-1) == y).double().mean(-1)
        torch.testing.assert_close(accuracy, hits, rtol=0, atol=1e-12)
    else:
        assert accuracy.isnan().all()
    same = run_loss(driver, kind, dtype, z, y, tz, scale, gradient=False)
    assert torch.equal(same[0], value) and same[2].isnan().all()


@pytest.mark.parametrize(
    ("kind", "samples"), [(0, 1024), (0, 70_000), (1, 1025), (2, 1025)]
)
def test_many_samples_are_summed_in_parts(driver, kind, samples):
    z, y, tz = loss_case(kind, 2, samples, 2)
    together = run_loss(driver, kind, torch.float64, z, y, tz, 0.1)
    want = 0.1 * LOSSES[kind](z, y)
    torch.testing.assert_close(together[0], want, rtol=1e-12, atol=1e-9)
    if kind == 1:
        hits = (z.argmax(-1) == y).double().mean(-1)
        torch.testing.assert_close(together[1], hits, rtol=0, atol=1e-12)
    alone = run_loss(driver, kind, torch.float64, z[1:], y[1:], tz[1:], 0.1)
    for some, one in zip(together, alone, strict=True):
        assert torch.equal(some[1].nan_to_num(), one[0].nan_to_num())
    half = samples // 2
    some = (v[:, half:].contiguous() for v in (z, y, tz))
    assert torch.equal(
        run_loss(driver, kind, torch.float64, *some, 0.1)[2], together[2][:, half:]
    )


@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**40)])
def test_labels_out_of_range_are_flagged_and_not_read(driver, label):
    z, y, tz = loss_case(1, 3, 7, 5)
    y[1, 4] = label
    value, accuracy, dz, tdz = run_loss(driver, 1, torch.float32, z, y, tz, 1.0)
    assert value.isnan().tolist() == [False, True, False]
    hits = (z.float().argmax(-1) == y).double().mean(-1)
    torch.testing.assert_close(accuracy, hits, rtol=0, atol=1e-12)
    assert tdz.isfinite().all()
    wrong = dz.isnan().all(-1)
    assert wrong.sum() == 1 and wrong[1, 4] and dz.isnan().sum() == 5


# -- vectors ---------------------------------------------------------------------------

SEGMENTS = [(0, 5), (16, 1), (32, 2100), (2144, 31)]
P = 2176


def _vectors(dtype, tasks, offset=1):
    memory = Memory(dtype, offset)
    rows = [memory.put(torch.randn(tasks, P).to(dtype)) for _ in range(2)]
    return memory, *rows, memory.empty(tasks * P).view(tasks, P)


def vector(driver, name, dtype, tasks, a, b, out, *, n=P, alpha=0.0, rate=None, **r):
    segments = torch.tensor(SEGMENTS).flatten()
    driver.call(
        *("vector", name, double(dtype), tasks, n, a, P, b, P, out, out.shape[-1]),
        *(alpha, rate, segments, len(SEGMENTS)),
        *(r.get("per_segment"), r.get("per_parameter")),
    )


@both_dtypes
@pytest.mark.parametrize("layout", ["per_segment", "per_parameter"])
def test_rates_apply_within_segments(driver, dtype, layout):
    memory, theta, g, out = _vectors(dtype, 3)
    rate = torch.full((P,), float("nan"), dtype=dtype)
    values = torch.rand(len(SEGMENTS)).to(dtype)
    for value, (first, count) in zip(values, SEGMENTS, strict=True):
        rate[first : first + count] = (
            value if layout == "per_segment" else torch.rand(count)
        )
    rates = {layout: values if layout == "per_segment" else rate}
    inside = ~rate.isnan()
    for name, want in (
        ("descend", theta.double() - rate.double() * g.double()),
        ("scale_by_rates", rate.double() * g.double()),
    ):
        out.fill_(float("nan"))
        vector(driver, name, dtype, 3, theta, g, out, **rates)
        close(out[:, inside], want[:, inside], dtype)
        assert out[:, ~inside].isnan().all()
    memory.check()


@both_dtypes
def test_dots_of_segments(driver, dtype):
    memory, g, v, _ = _vectors(dtype, 3)
    out = memory.empty(3 * len(SEGMENTS)).view(3, -1)
    vector(driver, "segment_dots", dtype, 3, g, v, out)
    product = g.double() * v.double()
    want = torch.stack([-product[:, a : a + n].sum(1) for a, n in SEGMENTS], 1)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-5)
    memory.check()


@both_dtypes
@pytest.mark.parametrize("n", [1, 1023, 1025, P])
def test_element_by_element(driver, dtype, n):
    memory, a, b, out = _vectors(dtype, 3)
    x, y = a.double().clone(), b.double()
    rate = torch.tensor([0.7], dtype=dtype)
    before = torch.randn(3, P).to(dtype)
    wanted = {
        "negative_product": -x * y,
        "update": x + 0.5 * rate.item() * y,
        "fill": torch.full_like(x, 0.5),
        "copy": y,
        "add": before.double() + y,
    }
    for name, want in wanted.items():
        out.copy_(before)
        more = {"rate": rate} if name == "update" else {}
        vector(driver, name, dtype, 3, a, b, out, n=n, alpha=0.5, **more)
        close(out[:, :n], want[:, :n], dtype)
        assert torch.equal(out[:, n:], before[:, n:])
    vector(driver, "update", dtype, 3, None, b, out, n=n, alpha=0.5)
    close(out[:, :n], 0.5 * y[:, :n], dtype)
    vector(driver, "update", dtype, 3, a, b, a, n=n, alpha=0.5)
    close(a[:, :n], (x + 0.5 * y)[:, :n], dtype)
    memory.check()


@both_dtypes
@pytest.mark.parametrize("rows", [1, 5, 9])
@pytest.mark.parametrize("losses", [0, 2, 130])
def test_means_over_tasks(driver, dtype, rows, losses):
    """Of whole rows, and into tensors, each where its index says; losses beside."""
    memory, values, _, _ = _vectors(dtype, rows)
    places = [(0, 31), (32, 0), (32, 1), (64, 2080), (2144, 32)]
    src = [values[:, at : at + n] for at, n in places]
    dst = [memory.empty(n) for _, n in places]
    index = [None, None, None, torch.randperm(2080, dtype=torch.int32), None]
    sizes = (double(dtype), rows, P, 5, torch.tensor([n for _, n in places]))
    weights, loss = torch.rand(1 + rows, losses).double().split((1, rows))
    out = torch.full((1,), math.nan, dtype=dtype) if losses else None
    beside = (losses, weights, loss, loss.clone(), out)
    driver.call("mean_tensors", *sizes, index, src, dst, *beside)
    means = memory.empty(P)
    vector(driver, "mean_rows", dtype, rows, values, None, means)
    for (at, n), i, to in zip(places, index, dst, strict=True):
        where = torch.arange(n) if i is None else i.long()
        assert torch.equal(to[where], means[at : at + n])
    close(means, values.double().mean(0), dtype)
    if losses:
        close(out[0], (loss.mean(0) * weights).sum(), dtype)
    memory.check()


@both_dtypes
@pytest.mark.parametrize(("tasks", "n"), [(1, 1), (5, 6), (300, 3), (2, 150)])
def test_the_meta_loss_is_of_weighted_columns_alone(driver, dtype, tasks, n):
    memory = Memory(torch.float64, 4)
    given = torch.rand(tasks, n, dtype=torch.float64)
    weights = torch.rand(n, dtype=torch.float64) * (torch.arange(n) % 3 == n % 3 - 1)
    weights[-1] = 0.5
    loss, accuracy = memory.put(given), memory.put(1 - given)
    out = torch.full((2,), float("nan"), dtype=dtype)  # its second stays
    driver.call("mean_loss", double(dtype), tasks, n, weights, loss, accuracy, out)
    close(out[0], (given.mean(0) * weights).sum(), dtype)
    assert out[1].isnan()
    absent = (weights == 0).expand_as(given)
    assert torch.equal(loss.isnan(), absent) and torch.equal(accuracy.isnan(), absent)
    assert torch.equal(loss[~absent], given[~absent])
    assert torch.equal(accuracy[~absent], 1 - given[~absent])
    memory.check()


@both_dtypes
@pytest.mark.parametrize("scatter", [0, 1])
def test_moves(driver, dtype, scatter):
    memory, counts, tasks = Memory(dtype, 3), (1, 1030, 7), 3
    src = [memory.put(torch.randn(tasks, n).to(dtype)) for n in counts]
    dst = [memory.empty(tasks * n).view(tasks, n) for n in counts]
    index = [None, torch.randperm(1030, dtype=torch.int32), None]
    sizes = torch.tensor(counts)
    driver.call("move", scatter, double(dtype), tasks, 3, sizes, index, src, dst)
    for s, d, i in zip(src, dst, index, strict=True):
        where = torch.arange(s.shape[1]) if i is None else i.long()
        assert torch.equal(d[:, where] if scatter else d, s if scatter else s[:, where])
    memory.check()


@both_dtypes
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 1), (3, 17, 65), (2, 33, 130)])
def test_channels_last(driver, dtype, shape):
    memory = Memory(dtype, 1)
    src, dst = memory.put(torch.randn(shape).to(dtype)), memory.empty(math.prod(shape))
    driver.call("to_channels_last", double(dtype), *shape, src, dst)
    assert torch.equal(dst.view(shape[0], shape[2], shape[1]), src.mT)
    memory.check()


@both_dtypes
@pytest.mark.parametrize("per_tensor", [0, 1])
@pytest.mark.parametrize("collect", [0, 1])
def test_rate_tables(driver, dtype, per_tensor, collect):
    rows, n = 4, 90
    adapted = (torch.arange(n) % 3 > 0).to(torch.uint8)
    wide = collect or per_tensor
    values = torch.rand(rows, n if wide else 1).to(dtype)
    out = torch.full((rows, 1 if collect and not per_tensor else n), math.nan).to(dtype)
    common = (double(dtype), rows, n, adapted)
    driver.call("rate_table", collect, *common, values, per_tensor, out)
    want = torch.where(adapted.bool(), values.double(), 0.0)
    close(out, want.sum(1, keepdim=True) if out.shape[1] == 1 else want, dtype)


# -- optimizers ------------------------------------------------------------------------

COUNTS = (1, 1024, 0, 2500, 7, *([3] * 60), 0)  # empty ones are counted too
ADAM = [
    {"lr": 0.01},
    {"lr": 0.02, "weight_decay": 0.1},
    {"lr": 0.02, "weight_decay": 0.1, "decoupled": True},
    {"lr": 0.01, "amsgrad": True, "maximize": True},
]
SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
]


def _tensors(dtype):
    memory = Memory(dtype, 1)
    return memory, [memory.put(torch.randn(n).to(dtype)) for n in COUNTS]


def _copies(memory, values):
    return [memory.put(v) for v in values]


@both_dtypes
@pytest.mark.parametrize("options", ADAM, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("device_rate", [False, True])
def test_adam_is_that_of_torch(driver, dtype, options, device_rate):
    memory, start = _tensors(dtype)
    theirs = [p.clone().double().requires_grad_() for p in start]
    settings = dict(options)
    kind = torch.optim.AdamW if settings.pop("decoupled", False) else torch.optim.Adam
    settings.setdefault("weight_decay", 0.0)
    optimizer = kind(theirs, **settings)
    p = _copies(memory, start)
    m, v, largest = (_copies(memory, [torch.zeros_like(q) for q in p]) for _ in "mvl")
    steps = [torch.zeros(1) for _ in p]
    arrivals = torch.zeros(1, dtype=torch.int32)
    rate = torch.tensor([options["lr"]], dtype=torch.float64)
    numbers = [math.nan if device_rate else options["lr"], 0.9, 0.999, 1e-8]
    numbers += [settings["weight_decay"], float("decoupled" in options)]
    numbers += [float("maximize" in options)]
    for _ in range(3):
        g = _copies(memory, [torch.randn_like(q) for q in p])
        for q, slope in zip(theirs, g, strict=True):
            q.grad = slope.double()
        optimizer.step()
        driver.call(
            *("adam", double(dtype), len(p), torch.tensor(COUNTS), g, p, m, v),
            *(largest if "amsgrad" in options else None, steps),
            *(
                torch.tensor(numbers, dtype=torch.float64),
                rate if device_rate else None,
                arrivals,
            ),
        )
        assert arrivals.item() == 0
    assert all(s.item() == 3 for s in steps)
    close(torch.cat(p), torch.cat(theirs).detach(), dtype)
    memory.check()


@both_dtypes
@pytest.mark.parametrize("options", SGD, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("device_rate", [False, True])
def test_sgd_is_that_of_torch(driver, dtype, options, device_rate):
    memory, start = _tensors(dtype)
    theirs = [p.clone().double().requires_grad_() for p in start]
    optimizer = torch.optim.SGD(theirs, **options)
    p = _copies(memory, start)
    buffers = [memory.empty(q.numel()) for q in p] if "momentum" in options else None
    rate = torch.tensor([options["lr"]], dtype=torch.float64)
    numbers = [math.nan if device_rate else options["lr"]]
    numbers += [options.get(n, 0.0) for n in ("momentum", "dampening", "weight_decay")]
    numbers += [float(options.get(n, False)) for n in ("nesterov", "maximize")]
    for step in range(3):
        g = _copies(memory, [torch.randn_like(q) for q in p])
        for q, slope in zip(theirs, g, strict=True):
            q.grad = slope.double()
        optimizer.step()
        driver.call(
            *("sgd", double(dtype), len(p), torch.tensor(COUNTS), g, p, buffers),
            *(int(step == 0), torch.tensor(numbers, dtype=torch.float64)),
            rate if device_rate else None,
        )
    close(torch.cat(p), torch.cat(theirs).detach(), dtype)
    memory.check()
