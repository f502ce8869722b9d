"""What bounds a meta-gradient, and what the tables say about it; no times here."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: fastmaml itself comes from where it is installed

from bench import cost, roofline, run, shares, targets  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402

# a core's ceilings in order of magnitude
CAPACITY = {"L1": 48 << 10, "L2": 1 << 20, "L3": 32 << 20}
BANDWIDTH = {"L1": 6e11, "L2": 2.7e11, "L3": 1.2e11, "memory": 5e10}
CORE = roofline.Ceilings(2.9e11, CAPACITY, BANDWIDTH)


def test_traffic_of_hand_counted_passes():
    """A step passes 6 times over all and twice over what follows the first product."""
    # forward 10, backward 20; query 10 + 4 + 10; chain 10 + 4, 10 + 4 + 10; mean 10
    assert cost.traffic(10, 6, tasks=1, steps=1) == 30 + 24 + 38 + 10
    assert cost.traffic(10, 6, tasks=3, steps=2) == 3 * (2 * 68 + 34)


def test_bytes_of_the_linear_layers():
    spent = cost.cost(WORKLOADS["omniglot-fc"])
    first, rest = 784 * 256, 256 * 128 + 128 * 64 + 64 * 64 + 64 * 5
    biases = 256 + 128 + 64 + 64 + 5
    norms = 256 + 128 + 64 + 64  # which shift, and scale by one
    parameters = 4 * (first + rest + biases + norms)
    assert spent.parameter_bytes == parameters
    assert spent.resident_bytes == 3 * parameters
    behind = parameters - 4 * first
    assert spent.traffic_bytes == 32 * (9 * parameters + 3 * behind)


def test_the_first_cache_that_holds_a_task_in_work_bounds_it():
    capacity = {"L1": 10, "L2": 100, "L3": 1000}
    bandwidth = {"L1": 9e9, "L2": 8.0, "L3": 4.0, "memory": 1.0}
    ceilings = roofline.Ceilings(50.0, capacity, bandwidth)

    def bound(resident, flops=1):
        spent = cost.Cost(flops, 0, 0, 0, traffic_bytes=80, resident_bytes=resident)
        return cost.memory_bound(spent, ceilings, threads=2)

    assert bound(5) == cost.MemoryBound("L2", 5.0, True)
    assert bound(100).level == "L2"  # each core has its own
    assert bound(500) == cost.MemoryBound("L3", 10.0, True)  # both share it
    assert bound(501) == cost.MemoryBound("memory", 40.0, True)
    assert bound(500, flops=1001) == cost.MemoryBound("L3", 10.0, False)


def test_memory_bounds_the_large_linear_layers_alone():
    bounds = {n: cost.memory_bound(cost.cost(w), CORE, 2) for n, w in WORKLOADS.items()}
    assert [n for n, b in bounds.items() if b.binds] == ["omniglot-fc"]
    assert bounds["omniglot-fc"].level == "L3"


def test_results_state_the_share_of_the_memory_bound():
    ceilings = roofline.Ceilings(50.0, {"L2": 100}, {"L2": 8.0, "memory": 1.0})
    spent = cost.Cost(1, 0, 0, 0, traffic_bytes=80, resident_bytes=100)
    mine = {"meta_gradient": {"median": 20e3}}
    workload = {
        "cost": {**dataclasses.asdict(spent), "bytes": 7},
        "contenders": {"fastmaml": mine},
    }
    shares.of_memory_bound(workload, ceilings, threads=2)
    assert workload["memory_bound"] == {"level": "L2", "ms": 5e3}
    assert mine["percent_of_memory_bound"] == 25.0
    workload["cost"]["flops"] = 1000
    del workload["memory_bound"], mine["percent_of_memory_bound"]
    shares.of_memory_bound(workload, ceilings, threads=2)
    assert "memory_bound" not in workload and len(mine) == 1


def test_a_run_writes_both_bounds(tmp_path, monkeypatch):
    """From measurement to table; ceilings and times are made up."""

    def measured(workload, options, plan, log):
        field = {"fastmaml": {"meta_gradient": {"median": 4.0}}}
        return {
            "cost": dataclasses.asdict(cost.cost(workload)),
            "contenders": field,
            "skipped": {},
        }

    monkeypatch.setattr(run, "run_workload", measured)
    monkeypatch.setattr(run.cost, "matrix_peak", lambda **_: 2e11)
    monkeypatch.setattr(run.cost, "copy_bandwidth", lambda **_: 5e10)
    monkeypatch.setattr(run.roofline, "measure_ceilings", lambda: CORE)
    monkeypatch.setattr(run.contenders, "native_missing", lambda: None)
    out = tmp_path / "result.json"
    names = ["omniglot-fc", "policy"]
    options = run.parse(["--quick", "--out", str(out), "--workloads", *names])
    run.run(options, lambda text: None)
    result = json.loads(out.read_text())
    assert result["peak"]["core"]["bandwidth"] == BANDWIDTH
    fc, policy = targets.of_result(result)
    spent = cost.cost(WORKLOADS["omniglot-fc"])
    threads = result["machine"]["threads"]
    least = 1e3 * cost.memory_bound(spent, CORE, threads).seconds
    assert fc.percent_of_memory == pytest.approx(100 * least / 4.0)
    assert policy.percent_of_memory is None


def standing(workload, percent_of_peak, **known):
    return targets.Standing(workload, 1.0, None, None, None, percent_of_peak, **known)


def test_shares_aimed_at_have_a_verdict():
    """Of the peak, or of memory where that is the bound; none without a measurement."""
    assert set(targets.SHARES) == set(targets.TARGETS) == set(WORKLOADS)
    assert standing("policy", 80.0).reached and not standing("policy", 79.9).reached
    assert standing("policy", float("nan")).reached is None
    assert standing("other", 99.0).reached is None
    assert standing("omniglot-fc", 99.0).reached is None
    for share, reached in ((70.0, True), (69.0, False)):
        fc = standing("omniglot-fc", 9.0, percent_of_memory=share, memory="L3")
        assert fc.reached is reached
        row = dict(zip(targets.HEAD, targets.cells(fc), strict=True))
        assert row["% of memory bound"] == f"{share:.0f} (L3)"
        assert row["share aimed at"] == "70% of memory bound"
        assert row["reached"] == ("yes" if reached else "no")
