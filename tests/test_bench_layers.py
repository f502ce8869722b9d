"""The table of layers counts, times and ranks as it says; no time is judged here."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from fastmaml import _native

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: fastmaml itself comes from where it is installed

from bench import cost, layers, roofline, timing  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402

needs_native = pytest.mark.skipif(
    _native.unavailable() is not None, reason="the native engine is not built"
)
LINEAR = {
    "name": "a",
    "kind": "bilinear",
    "inputs": 3,
    "outputs": 4,
    "parameters": 16,
    "multiply_adds": 12,
    "trained": True,
    "adjoint": True,
}
CEILINGS = roofline.Ceilings(
    operations=1e9,
    capacity={"L1": 1000, "L2": 10_000, "L3": 100_000},
    bandwidth={"L1": 4e9, "L2": 2e9, "L3": 1e9, "memory": 5e8},
)


def small(name, **sizes):
    workload = WORKLOADS[name]
    samples = {"support": min(workload.support, 10), "query": min(workload.query, 10)}
    return workload.resized(**{"tasks": 2, **samples, **sizes})


# -- roofline -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, products, elements",
    [
        ("forward", 1, 6 + 16 + 8),
        ("backward", 2, 2 * 6 + 8 + 2 * 16),
        ("tangent_forward", 2, 2 * 6 + 2 * 16 + 8),
        ("tangent_backward", 4, 3 * 6 + 2 * 8 + 3 * 16),
    ],
)
def test_need_of_a_hand_counted_linear_layer(name, products, elements):
    """Inputs [2, 3], weights [3, 4] and a bias, outputs [2, 4]."""
    need = roofline.pass_need(LINEAR, name, samples=2)
    assert need == roofline.Need(2 * 2 * 12 * products, 4 * elements)


@pytest.mark.parametrize("name", roofline.PASSES)
def test_the_first_layer_takes_one_product_a_pass(name):
    first = {**LINEAR, "adjoint": False}
    need = roofline.pass_need(first, name, samples=2)
    assert need.operations == 2 * 2 * 12


def test_strips_take_over_what_the_norm_above_does_to_unpooled_pixels():
    conv = {**LINEAR, "adjoint": False}
    strips = {**conv, "strips": True}
    norm = {"kind": "batch_norm_pool", "inputs": 8, "outputs": 2, "parameters": 0}
    swept = {**norm, "swept_below": True}
    for name in roofline.PASSES:
        ty = 4 * 2 * 4 if name.startswith("tangent") else 0
        alone, together = (roofline.pass_need(c, name, 2) for c in (conv, strips))
        assert together == roofline.Need(alone.operations, alone.bytes + ty)
        alone, together = (roofline.pass_need(n, name, 2) for n in (norm, swept))
        assert 4 * together.operations == alone.operations
        assert together.bytes < alone.bytes


def test_smooth_activations_read_what_piecewise_linear_ones_do_not():
    sizes = {"inputs": 5, "outputs": 5, "parameters": 0}
    relu = roofline.pass_need({"kind": "relu", **sizes}, "tangent_backward", 1)
    tanh = roofline.pass_need({"kind": "tanh", **sizes}, "tangent_backward", 1)
    assert relu.bytes == 4 * 15 and tanh.bytes == 4 * 25


def test_roofline_is_the_later_of_operations_and_bytes():
    assert CEILINGS.seconds(roofline.Need(1000, 200)) == pytest.approx(1e-6)
    assert CEILINGS.seconds(roofline.Need(10, 8000)) == pytest.approx(4e-6)


@pytest.mark.parametrize(
    "count, level",
    [(10, "L2"), (10_000, "L2"), (10_001, "L3"), (100_001, "memory")],
)
def test_bytes_come_from_the_smallest_cache_but_never_the_first(count, level):
    assert CEILINGS.level(count) == level


def test_cache_sizes_are_read_or_usual(tmp_path):
    entries = [
        ("1", "Data", "48K"),
        ("1", "Instruction", "64K"),
        ("2", "Unified", "2048K"),
    ]
    for number, (level, kind, size) in enumerate(entries):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(value + "\n")
    assert roofline.cache_sizes(tmp_path) == {"L1": 48 << 10, "L2": 2 << 20}
    assert roofline.cache_sizes(tmp_path / "none") == roofline.USUAL_CACHES


@needs_native
def test_ceilings_are_measured():
    core = _native.core()
    assert core.multiply_add_peak(1) > 1e8
    for kind in ("read", "write", "copy"):
        assert core.stream_bandwidth(kind, 1 << 16, 1) > 1e7
    with pytest.raises(ValueError, match="expected read, write or copy, got 'burn'"):
        core.stream_bandwidth("burn", 4096, 1)
    with pytest.raises(ValueError, match="multiple of 4096, got 100"):
        core.stream_bandwidth("read", 100, 1)


# -- what a meta-gradient is made of ------------------------------------------------


def test_calls_of_a_meta_gradient():
    work = WORKLOADS["sinusoid-5"].resized(tasks=3, support=7, query=9)
    kept = layers.pass_calls(work, kept=True)
    assert ("forward", 7, 15) in kept and ("backward", 9, 3) in kept
    assert ("tangent_backward", 7, 15) in kept
    again = layers.pass_calls(work, kept=False)
    assert ("forward", 7, 15 + 12) in again and ("tangent_forward", 7, 15) in again


def test_vector_operations_of_a_meta_gradient():
    work = WORKLOADS["sinusoid-5"].resized(tasks=3)
    needs = layers.vector_needs(work, parameters=100)
    assert needs["descend"] == (15, roofline.Need(200, 1200))
    assert needs["add"][0] == 15 + 3
    assert needs["mean_rows"] == (1, roofline.Need(300, 1600))


@needs_native
@pytest.mark.parametrize("name", ["sinusoid-1", "sinusoid-5", "omniglot-fc", "policy"])
def test_products_of_all_rows_cost_what_the_meta_gradient_does(name):
    work = small(name, query=5)
    rows = layers.cases(work)
    products = [c for c in rows if c.kind == "bilinear"]
    total = sum(c.calls * c.need.operations for c in products)
    assert total == cost.cost(work).flops


@needs_native
def test_padding_is_not_multiplied():
    work = small("omniglot-conv-1")
    products = [c for c in layers.cases(work) if c.kind == "bilinear"]
    total = sum(c.calls * c.need.operations for c in products)
    assert 0.7 * cost.cost(work).flops < total < cost.cost(work).flops


@needs_native
@pytest.mark.parametrize("name", ["sinusoid-1", "omniglot-conv-1", "mini-imagenet"])
def test_every_row_can_be_timed(name):
    work = small(name, support=5, query=5, tasks=1, steps=1)
    rows = layers.cases(work)
    operations = {c.operation for c in rows}
    assert operations > {*roofline.PASSES, "descend", "mean_rows", "value", "hessian"}
    assert ("to_channels_last" in operations) == (name == "mini-imagenet")
    assert all(case.time(2) > 0 for case in rows)


@needs_native
def test_bad_arguments_of_a_layer_bench_are_named():
    core, program = _native.core(), layers.program_of(small("sinusoid-1"))
    bench = core.LayerBench(program, 4, 1)
    with pytest.raises(ValueError, match="layer: expected 0 to 2, got 9"):
        bench.time_pass(9, "forward", 1)
    with pytest.raises(ValueError, match="got 'sideways'"):
        bench.time_pass(0, "sideways", 1)
    with pytest.raises(ValueError, match="repeats: expected at least one, got 0"):
        bench.time_pass(0, "forward", 0)
    with pytest.raises(ValueError, match="vector operation: .* got 'divide'"):
        bench.time_vector("divide", 1)
    with pytest.raises(ValueError, match="samples: expected at least one, got 0"):
        core.LayerBench(program, 0, 1)


# -- rows and the table -------------------------------------------------------------


def case(operations, count, calls, seconds, operation="forward"):
    need = roofline.Need(operations, count)
    return layers.Case("l", "relu", operation, 5, calls, need, lambda n: seconds)


def test_a_row_states_shares_and_the_gap():
    """1 us of operations and 0.5 us of bytes at the ceilings, measured at 3 us."""
    spent = timing.summarize([3e-6])
    row = layers.row("w", case(1000, 1000, 10, 3e-6), spent, CEILINGS)
    assert row["percent_of_operations"] == pytest.approx(100 / 3)
    assert row["percent_of_bandwidth"] == pytest.approx(50 / 3)
    assert row["total_ms"] == pytest.approx(0.03)
    assert row["gap_ms"] == pytest.approx(0.02)


def test_nothing_is_faster_than_its_roofline_by_a_negative_gap():
    row = layers.row("w", case(1000, 0, 1, 5e-7), timing.summarize([5e-7]), CEILINGS)
    assert row["gap_ms"] == 0


def test_measuring_repeats_what_is_short():
    seen = []
    one = dataclasses.replace(case(1, 1, 1, 0), time=lambda n: seen.append(n) or 1e-6)
    plan = timing.Plan(rounds=3, min_sample=1e-4)
    assert layers.measure(one, plan).median == 1e-6
    assert seen == [1, 100, 100, 100, 100]


def test_the_table_is_sorted_by_gap():
    spent = timing.summarize([1e-3])
    rows = [
        layers.row("w", case(0, 0, calls, 1e-3, name), spent, CEILINGS)
        for calls, name in ((1, "forward"), (9, "backward"), (3, "tangent_forward"))
    ]
    lines = layers.table(rows).splitlines()[1:]
    assert [line.split()[3] for line in lines] == [
        "backward",
        "tangent_forward",
        "forward",
    ]
    assert len(layers.table(rows, top=1).splitlines()) == 2


@needs_native
def test_the_command_writes_rows_and_totals(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layers, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setitem(WORKLOADS, "sinusoid-1", small("sinusoid-1"))
    out = tmp_path / "layers.json"
    layers.main(["--workloads", "sinusoid-1", "--quick", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["kind"] == "layers" and result["quick"]
    total = result["totals"]["sinusoid-1"]
    assert total["parts_ms"] == pytest.approx(
        sum(r["total_ms"] for r in result["rows"])
    )
    left = total["core_ms"] - total["parts_ms"]
    assert total["unaccounted_ms"] == pytest.approx(left)
    printed = capsys.readouterr().out
    assert "tangent_backward" in printed and "unaccounted" in printed
