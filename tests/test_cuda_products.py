"""Linear and Conv2d of the CUDA backend, run by the emulation, against torch's float64.

Each arithmetic and each tile is tested by itself: which of them the engine takes
depends on the shapes, and tiles on the number of tasks.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import emulated_bilinear as emulated
import pytest
import torch
from close import LEDGER, assert_close
from emulated_bilinear import ARITHMETIC, PASSES, TILES, Layer, Options

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SQUARE = {"kernel": (3, 3), "padding": (1, 1)}
HALVING = {**SQUARE, "stride": (2, 2)}

# Sizes lie around tiles of 8, 16, 32, 64 and 128 rows or columns and steps of 32.
LAYERS = [
    Layer(1, 1),
    Layer(1, 40, samples=10, relu=True),
    Layer(40, 1, samples=10, relu_input=True),
    Layer(5, 3, samples=1, tasks=3),
    Layer(7, 9, samples=17, bias=False),
    Layer(16, 64, samples=16),
    Layer(20, 100, samples=33, relu=True),
    Layer(31, 63, samples=63, relu_input=True),
    Layer(32, 64, samples=64, relu=True, relu_input=True),
    Layer(33, 65, samples=65),
    Layer(100, 6, samples=129, relu_input=True),
    Layer(129, 33, samples=5, shared=True),
    Layer(64, 32, samples=31, shared=True, relu=True),
    Layer(1, 64, height=8, width=8, **HALVING),
    Layer(8, 16, height=7, width=7, samples=2, **HALVING),
    Layer(64, 64, height=4, width=4, samples=2, **HALVING),
    Layer(3, 32, height=9, width=10, samples=2, **SQUARE),
    Layer(32, 32, height=5, width=5, samples=2, shared=True, **SQUARE),
    Layer(17, 33, 2, height=4, width=3, kernel=(3, 3), stride=(2, 1), padding=(1, 2)),
    Layer(5, 32, 3, height=7, width=6, kernel=(5, 3), stride=(1, 2), padding=(2, 0)),
    Layer(3, 9, 2, height=4, width=4, kernel=(2, 2)),
    Layer(16, 5, 2, height=6, width=5, kernel=(2, 2), stride=(3, 2), padding=(0, 1)),
    Layer(2, 17, 2, height=6, width=8, kernel=(3, 3), stride=(3, 3), padding=(2, 2)),
    Layer(16, 33, 2, height=5, width=5, stride=(2, 2), bias=False),
    Layer(4, 8, 2, height=3, width=4),
    Layer(2, 3, 2, height=3, width=2, kernel=(1, 2), stride=(1, 3), padding=(2, 3)),
    Layer(3, 5, 1, height=4, width=4, kernel=(4, 4)),
]
# Their weight gradients are summed in parts.
LONG = [
    Layer(20, 6, samples=2100),
    Layer(4, 8, samples=17, tasks=1, height=8, width=8, **SQUARE),
    Layer(5, 70, samples=2060, tasks=1, shared=True, relu=True),
]
every_layer = pytest.mark.parametrize("layer", [*LAYERS, *LONG], ids=str)
some_layers = pytest.mark.parametrize(
    "layer", [LAYERS[i] for i in (6, 10, 14, 16, 18, 21)] + LONG[:1], ids=str
)
few_layers = pytest.mark.parametrize(
    "layer", [LAYERS[6], LAYERS[14], LAYERS[16], LONG[0]], ids=str
)
every_tile = pytest.mark.parametrize(
    "tile", range(len(TILES)), ids=[f"{m}x{n}" for m, n in TILES]
)
every_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETIC)
BOUNDS = {
    "scalar": "float32 pass",
    **{a: f"{a.replace('_', ' ')} product" for a in ARITHMETIC[1:]},
}


@pytest.fixture(scope="module")
def library(compiled):
    return emulated.build(compiled)


def check(library, layer, options, bounds="float64 pass", values=None, want=None):
    """Runs the passes and compares those that ran; returns the results."""
    values = values or emulated.values_of(layer)
    want = want or emulated.wanted(layer, values, options.without)
    got = emulated.run(library, layer, values, options)
    want = emulated.in_engine_layout(layer, want, got["y"])
    for pass_name, names in zip(PASSES, emulated.OUTPUTS, strict=True):
        for name in names:
            if pass_name not in options.passes or name in options.without:
                continue
            for n in {name, name.replace("w", "b")} & set(want):
                assert_close({n: got[n]}, {n: want[n]}, bounds, str(layer))
    return got


# -- values ----------------------------------------------------------------------------


@every_layer
def test_float64_is_what_torch_computes(library, layer):
    check(library, layer, Options())


@every_tile
@some_layers
def test_every_tile_in_float64(library, layer, tile):
    check(library, layer, Options(tile=tile))


@every_arithmetic
@every_layer
def test_every_arithmetic_in_float32(library, layer, arithmetic):
    options = Options(arithmetic=arithmetic, dtype=torch.float32)
    check(library, layer, options, BOUNDS[arithmetic])


@every_tile
@every_arithmetic
@few_layers
def test_no_tile_changes_a_bit(library, layer, arithmetic, tile):
    options = Options(arithmetic=arithmetic, dtype=torch.float32, tile=tile)
    values = emulated.values_of(layer)
    got = emulated.run(library, layer, values, options)
    want = emulated.run(library, layer, values, replace(options, tile=None))
    assert_close(got, want, "exact", str(layer))


@pytest.mark.parametrize("precision", emulated.PRECISIONS)
def test_precision_chooses_the_arithmetic(library, precision):
    layer = LAYERS[9]
    options = Options(precision=precision, dtype=torch.float32)
    arithmetic = "split_tf32" if precision == "float32" else precision
    got = check(library, layer, options, BOUNDS[arithmetic])
    told = replace(options, arithmetic=arithmetic, precision="float32")
    values = emulated.values_of(layer)
    assert_close(got, emulated.run(library, layer, values, told), "exact", precision)


@pytest.mark.parametrize("coarse", ["tf32", "bfloat16"])
def test_coarse_arithmetic_is_not_finer_than_it_says(library, coarse):
    layer, finer = LAYERS[9], LEDGER[BOUNDS["split_tf32"]].l2
    values = emulated.values_of(layer)
    options = Options(arithmetic=coarse, dtype=torch.float32)
    got = emulated.run(library, layer, values, options)
    want = emulated.in_engine_layout(layer, emulated.wanted(layer, values), got["y"])
    for n in ("y", "ty", "dx", "tdx", "dw", "tdw"):
        assert (got[n] - want[n]).norm() > 100 * finer * want[n].norm(), n
    for n in ("db", "tdb"):  # sums of float32, never rounded
        assert_close({n: got[n]}, {n: want[n]}, BOUNDS["split_tf32"], n)


def test_split_tf32_is_as_accurate_as_float32(library):
    layer = Layer(300, 40, samples=70)
    values = emulated.values_of(layer)
    exact = emulated.wanted(layer, values)
    errors = {}
    for arithmetic in ("scalar", "split_tf32"):
        options = Options(arithmetic=arithmetic, dtype=torch.float32)
        got = emulated.run(library, layer, values, options)
        want = emulated.in_engine_layout(layer, exact, got["y"])
        errors[arithmetic] = {n: float((got[n] - want[n]).norm()) for n in want}
    for n, error in errors["split_tf32"].items():
        assert error < 1.5 * errors["scalar"][n], n


# -- what is fused into the stores, left out, or lies askew ----------------------------


@pytest.mark.parametrize("base", ["none", "other", "same"])
@pytest.mark.parametrize("rates", [None, (0.25, 3.0)], ids=["no-rates", "rates"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layer", [LAYERS[i] for i in (9, 14, 16)] + LONG, ids=str)
def test_updates(library, layer, base, rates, dtype):
    values, scales = emulated.values_of(layer), (-0.5, 2.0)
    want = dict(emulated.wanted(layer, values))
    for i, parts in enumerate((("dw", "tdw"), ("db", "tdb"))):
        start = values[("base", "base_b")[i]] * (base != "none")
        scale = scales[i] * (rates[i] if rates else 1)
        want |= {n: start + scale * want[n] for n in parts}
    options = Options(base=base, scales=scales, rates=rates, dtype=dtype)
    options = replace(options, passes=("backward", "tangent_backward"))
    bounds = "float64 pass" if dtype == torch.float64 else BOUNDS["scalar"]
    check(library, layer, options, bounds, values, want)


@pytest.mark.parametrize(
    "without",
    [("tx", "tdx"), ("tw",), ("tx", "tw"), ("dx", "tdx"), ("dw", "tdw")],
    ids="-".join,
)
@some_layers
def test_null_operands_are_zero_and_null_outputs_not_computed(library, layer, without):
    got = check(library, layer, Options(without=without))
    for name in ("dx", "tdx", "dw", "tdw"):
        if name in without:
            assert got[name].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@some_layers
def test_one_launch_of_both_adjoints_gives_the_bits_of_two(library, layer, dtype):
    values, options = emulated.values_of(layer), Options(dtype=dtype)
    both = emulated.run(library, layer, values, options)
    for without in (("dx", "tdx"), ("dw", "tdw")):
        own = replace(options, without=without)
        alone = emulated.run(library, layer, values, own)
        names = {"dx", "tdx", "dw", "tdw", "db", "tdb"} & set(alone)
        names -= {*without, *(n.replace("w", "b") for n in without)}
        same = {n: both[n] for n in names}
        assert_close({n: alone[n] for n in names}, same, "exact", str(layer))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@few_layers
def test_a_product_may_go_where_its_direction_is(library, layer, dtype):
    values = emulated.values_of(layer)
    options = Options(dtype=dtype, base="direction", passes=("tangent_backward",))
    got = emulated.run(library, layer, values, options)
    want = emulated.run(library, layer, values, replace(options, base="none"))
    names = {"tdx", "tdw"}
    same = {n: want[n] for n in names}
    assert_close({n: got[n] for n in names}, same, "exact", str(layer))


@pytest.mark.parametrize("offset", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layer", [LAYERS[8], LAYERS[14], LAYERS[17]], ids=str)
def test_arrays_off_every_boundary(library, layer, dtype, offset):
    bounds = "float64 pass" if dtype == torch.float64 else BOUNDS["split_tf32"]
    got = check(library, layer, Options(offset=offset, dtype=dtype), bounds)
    straight = emulated.run(
        library, layer, emulated.values_of(layer), Options(dtype=dtype)
    )
    assert_close(got, straight, "exact", str(layer))


def test_nan_stays_where_it_is(library):
    layer = Layer(16, 64, samples=16, relu=True)
    values = emulated.values_of(layer)
    values["x"][1, 3, 5] = float("nan")
    for arithmetic in ARITHMETIC:
        options = Options(
            arithmetic=arithmetic, dtype=torch.float32, passes=("forward",)
        )
        bad = emulated.run(library, layer, values, options)["y"].isnan()
        assert bad[1, 3].all() and bad.sum() == layer.out


# -- order -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
@every_arithmetic
@few_layers
def test_no_order_of_threads_changes_a_bit(library, layer, arithmetic, seed):
    options = Options(arithmetic=arithmetic, dtype=torch.float32)
    values = emulated.values_of(layer)
    want = emulated.run(library, layer, values, options)
    again = emulated.run(library, layer, values, options)
    shuffled = emulated.run(library, layer, values, replace(options, seed=seed))
    assert_close(again, want, "exact", str(layer))
    assert_close(shuffled, want, "exact", str(layer))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@some_layers
def test_a_task_has_the_same_bits_alone_and_among_others(library, layer, dtype):
    many = replace(layer, tasks=40 if layer.samples < 20 else 3)
    values = emulated.values_of(many)
    together = emulated.run(library, many, values, Options(dtype=dtype))
    for t in (0, many.tasks - 1):
        own = {n: v[t : t + 1] for n, v in values.items()}
        alone = emulated.run(
            library, replace(layer, tasks=1), own, Options(dtype=dtype)
        )
        same = {n: v[t : t + 1] for n, v in together.items()}
        assert_close(alone, same, "exact", str(layer))


@pytest.mark.parametrize("layer", LONG, ids=str)
def test_long_sums_are_cut(library, layer):
    assert emulated.parts(library, layer) > 1


# -- what is refused -------------------------------------------------------------------


def test_images_that_offsets_cannot_reach(library):
    layer = Layer(1, 1, samples=1, tasks=1, height=1, width=20000)
    with pytest.raises(RuntimeError, match="up to 16384 pixels .* got 1 x 20000"):
        emulated.run(library, layer, emulated.values_of(layer), Options())
