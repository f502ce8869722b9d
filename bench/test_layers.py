"""``pytest bench/test_layers.py``: every pass of every layer under pytest-benchmark.

The table sorted by what a meta-gradient loses comes from ``python -m bench.layers``.
"""

import functools

import pytest

from bench import layers, roofline
from bench.workloads import WORKLOADS
from fastmaml import _native

# the other two run the same passes at the same sizes, only more often
NAMES = [n for n in WORKLOADS if n not in ("sinusoid-5", "omniglot-conv-5")]


@functools.lru_cache(maxsize=1)  # data of one network at a time
def found(name):
    return layers.cases(WORKLOADS[name])


def cases():
    """(workload, index), with an id that says which pass of which layer."""
    if _native.unavailable():
        return []
    return [
        pytest.param(
            name,
            index,
            id=f"{name}-{case.layer}-{case.kind}-{case.operation}-{case.samples}",
        )
        for name in NAMES
        for index, case in enumerate(layers.cases(WORKLOADS[name]))
    ]


@pytest.fixture(scope="session")
def ceilings():
    return roofline.measure_ceilings()


@pytest.mark.parametrize("name, index", cases())
def test_pass(benchmark, ceilings, name, index):
    case = found(name)[index]
    repeats = max(1, round(0.002 / max(case.time(3), 1e-9)))
    benchmark.group = f"{name} layers"
    benchmark.pedantic(case.time, args=(repeats,), rounds=5)
    if benchmark.disabled:
        return
    spent = layers.measure(case, layers.QUICK)
    benchmark.extra_info.update(layers.row(name, case, spent, ceilings))
