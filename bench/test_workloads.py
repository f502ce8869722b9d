"""``pytest bench``: every contender on every workload under pytest-benchmark.

Contenders run one after the other here, so use this to watch one of them; for
comparisons take ``python -m bench.run``, which interleaves them.
"""

import os

import pytest

from bench import contenders, cost, peers
from bench.timing import cycle, time_call
from bench.workloads import WORKLOADS
from fastmaml import _native

ALL = os.environ.get("FASTMAML_BENCH_ALL") == "1"
SECONDS = 1.0  # per case, after its first call
SLOW = {("JAX jit vmap", name) for name in contenders.LONG_COMPILES}


@pytest.fixture(scope="session")
def peak():
    return cost.matrix_peak()


def _check_runnable(workload, name):
    if name == contenders.OURS and (reason := _native.unavailable()):
        pytest.skip(f"native engine: {reason.splitlines()[0]}")
    if reason := contenders.reason_to_skip(workload, name, compile_all=ALL):
        pytest.skip(reason)
    if (name, workload.name) in SLOW and not ALL:
        pytest.skip("takes minutes; measured with FASTMAML_BENCH_ALL=1")


@pytest.mark.parametrize("name", contenders.names())
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS.keys())
@pytest.mark.parametrize("quantity", ["meta_gradient", "meta_step", "training_step"])
def test_speed(benchmark, record, peak, quantity, workload, name):
    _check_runnable(workload, name)
    contender = contenders.make(workload, name)
    if quantity == "training_step":
        if contender.training_step is None:
            pytest.skip("takes its tasks from outside")
        call = contender.training_step
    else:
        inputs = [contender.prepare(workload.batch(seed)) for seed in range(3)]
        call = cycle(getattr(contender, quantity), inputs)
    call()
    once = time_call(call, 1)
    iterations = max(1, round(0.02 / once))
    rounds = min(25, max(3, round(SECONDS / (once * iterations))))
    benchmark.group = f"{workload.name} {quantity}"
    benchmark.pedantic(call, rounds=rounds, iterations=iterations)
    if benchmark.disabled:
        return
    flops = cost.cost(workload).flops
    median = benchmark.stats.stats.median
    benchmark.extra_info["gflop"] = flops / 1e9
    percent = cost.percent_of_peak(flops, median, peak)
    benchmark.extra_info["percent_of_peak"] = percent
    ours = name == contenders.OURS and quantity == "meta_gradient"
    record(workload.name, quantity, name, median, percent if ours else None)


def test_left_out_peers_have_reasons():
    assert all(peers.unavailable().values())
