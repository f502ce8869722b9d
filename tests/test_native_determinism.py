"""A task gets the same bits alone, in a batch, in any order, on any threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from close import assert_close
from native_cases import (
    DTYPES,
    Case,
    Forgetful,
    assert_same_bits,
    case,
    cast,
    everything,
    native,
    threads,
)
from problems import Problem
from torch import nn

from fastmaml import _native

both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def _wide() -> nn.Module:
    """Large enough that every loop of a pass has several parts to hand out."""
    return nn.Sequential(
        nn.Conv2d(3, 33, 3, padding=1),
        nn.BatchNorm2d(33, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(33, 20, 3, padding=1),
        nn.LayerNorm((20, 6, 6)),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(180, 70),
        nn.Tanh(),
        nn.Linear(70, 5),
    )


WIDE = Problem("wide", _wide, (3, 12, 12), 5, loss="cross_entropy", samples=9)


def _large() -> nn.Module:
    """A convolution whose weight gradient is summed in parts, added in order."""
    return nn.Sequential(
        nn.Conv2d(2, 17, 1),
        nn.Tanh(),
        nn.Conv2d(17, 16, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(31),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


LARGE = Problem("large", _large, (2, 31, 31), 5, loss="cross_entropy", samples=5)
CASES = [
    WIDE,
    LARGE,
    "omniglot-conv",
    "policy",
    "layer-norm-space",
    "linear-many-samples",
]
every_case = pytest.mark.parametrize("problem", CASES, ids=str)


def of_task(results: dict, task: int) -> dict:
    """The part of one task; means over tasks have none."""
    parts = {n: r for n, r in results.items() if not n.startswith("mean.")}
    return {n: r[task].clone() for n, r in parts.items()}


def chosen(c: Case, order: list[int]) -> Case:
    """A case with some of its tasks, in the given order."""
    return Case(
        c.problem,
        c.model,
        c.params,
        {n: p[order] for n, p in c.own.items()},
        {n: v[order] for n, v in c.vector.items()},
        c.tasks[order],
        c.rates,
    )


@both_dtypes
@every_case
def test_threads_change_no_bit(problem, dtype):
    """Two tasks: one after the other, a thread each, and teams of threads."""
    c = case(problem)
    engine = native(c)
    with threads(1):
        want = everything(engine, c, dtype)
        assert engine.plan.slots == 1
    for count in (2, 3, 4, 8):
        with threads(count):
            assert_same_bits(everything(engine, c, dtype), want)
            assert engine.plan.slots == 2


@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_threads_left_without_a_task_change_no_bit(tasks):
    """They help inside the tasks that still run: how many there are is chance."""
    c = case(WIDE, tasks=tasks)
    engine = native(c)
    with threads(1):
        want = everything(engine, c, torch.float32)
    for count in (2, 4, 8):
        with threads(count):
            for _ in range(3):
                assert_same_bits(everything(engine, c, torch.float32), want)
            assert engine.plan.slots == min(tasks, count)


@both_dtypes
@every_case
def test_a_task_alone_is_as_in_a_batch_in_any_order(problem, dtype):
    c = case(problem, tasks=3)
    engine = native(c)
    with threads(2):
        whole = everything(engine, c, dtype)
        mixed = everything(engine, chosen(c, [2, 0, 1]), dtype)
        for task, place in enumerate((1, 2, 0)):
            want = of_task(whole, task)
            assert_same_bits(of_task(mixed, place), want)
            alone = everything(engine, chosen(c, [task]), dtype)
            assert_same_bits(of_task(alone, 0), want)
    means = [
        {n: r for n, r in results.items() if n.startswith("mean.")}
        for results in (mixed, whole)
    ]
    name = "float64 pass" if dtype == torch.float64 else "float32 pass"
    assert_close(*means, name, "mean over tasks in another order")


def test_the_mean_of_many_parameters_is_split_without_a_trace():
    """Over 16384 parameters the mean over tasks runs on several threads."""
    wide = Problem(
        "many", lambda: nn.Sequential(nn.Linear(150, 130), nn.Tanh()), (150,), 130
    )
    c = case(wide)
    assert sum(p.numel() for p in c.params.values()) > 16384
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(everything(native(c), c, steps=1))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@every_case
def test_repetition_changes_no_bit(problem):
    c = case(problem)
    engine = native(c)
    want = everything(engine, c, torch.float32)
    for _ in range(3):
        assert_same_bits(everything(engine, c, torch.float32), want)
    assert_same_bits(everything(native(c), c, torch.float32), want)


def test_calls_of_another_shape_in_between_change_no_bit():
    c, small = case(WIDE), case(WIDE, tasks=1, samples=2)
    engine = native(c)
    want = everything(engine, c)
    everything(engine, small)
    assert_same_bits(everything(engine, c), want)


@pytest.mark.parametrize("own_engines", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_calls_from_several_python_threads_at_once(count, own_engines):
    cases = [case(p) for p in ("omniglot-conv", "policy", "linear-many-samples")]
    engines = [native(cases[i % 3]) for i in range(6)]
    with threads(count):
        wanted = [everything(engines[i], cases[i]) for i in range(3)]

        def work(i: int) -> None:
            engine = engines[i if own_engines else i % 3]
            for _ in range(3):
                assert_same_bits(everything(engine, cases[i % 3]), wanted[i % 3])

        at_once(work, 6)


def from_child(target: Callable, *arguments: Any) -> Any:
    """What a forked child sends through its connection, its first argument."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=target, args=(send, *arguments))
    child.start()
    send.close()
    try:
        assert receive.poll(30), "the child hangs"
        with contextlib.suppress(EOFError):  # nothing was sent
            result = receive.recv()
        child.join(60)
        assert child.exitcode == 0, f"the child ended with {child.exitcode}"
        return result
    finally:
        if child.is_alive():
            child.kill()


def at_once(work: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, i) for i in range(count)]:
            done.result(timeout=120)


def _build_at_once(connection, c) -> None:
    sys.setswitchinterval(1e-5)

    def work(i: int) -> None:
        for _ in range(10):
            native(c)

    try:
        at_once(work, 4)
        connection.send("built")
    except Exception as error:
        connection.send(repr(error))
    connection.close()


@forks
def test_engines_are_built_in_several_python_threads_at_once():
    """In a child: where it goes wrong, it leaves every module of the process broken."""
    assert from_child(_build_at_once, case("omniglot-conv")) == "built"


def _compute_and_resize(connection, seconds: float) -> None:
    """Two threads compute, a third changes the number of the engine's threads."""
    sys.setswitchinterval(1e-6)
    cases = [case("linear-9to15", tasks=8), case("omniglot-conv", tasks=4)]
    engines = [native(c, Forgetful) for c in cases]
    wanted = [everything(e, c) for e, c in zip(engines, cases, strict=True)]
    end = time.monotonic() + seconds

    def work(i: int) -> None:
        while time.monotonic() < end:
            for count in (1, 4) if i == 2 else ():
                _native.core().set_num_threads(count)
            if i < 2:
                assert_same_bits(everything(engines[i], cases[i]), wanted[i])

    at_once(work, 3)
    connection.send("done")
    connection.close()


@forks
def test_threads_may_change_in_the_middle_of_a_call():
    """In a child: a workspace planned for fewer threads than run is overrun."""
    with threads(1):
        assert from_child(_compute_and_resize, 2.0) == "done"


def test_thread_counts_are_what_was_asked_for():
    core = _native.core()
    before = core.num_threads()
    for count in (1, 3, 2):
        with threads(count):
            assert core.num_threads() == core.build_info()["threads"] == count
    assert core.num_threads() == before
    with threads(0):
        assert core.num_threads() >= 1


def bytes_of(results: dict) -> dict:
    return {n: r.numpy().tobytes() for n, r in results.items()}


def _compute(connection, engine, c, counts: list[int]) -> None:
    answers = []
    for count in counts:
        with threads(count):
            answers.append(bytes_of(everything(engine, c, torch.float32)))
    connection.send(answers)
    connection.close()


@forks
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_forked_child_computes_the_same(count):
    """It has none of its parent's threads: it can't wait for them, nor stop them."""
    c = case("omniglot-conv")
    engine = native(c)
    with threads(count):
        want = everything(engine, c, torch.float32)
        got = from_child(_compute, engine, c, [count, 1, 3, 2])
        assert got == [bytes_of(want)] * 4
        assert_same_bits(everything(engine, c, torch.float32), want)


@forks
def test_a_child_forked_in_the_middle_of_a_call_computes_the_same():
    """The call goes on in the parent alone; what it had locked is free in the child."""
    busy, c = case(WIDE, tasks=60), case("policy")
    running, engine = native(busy), native(c)
    with threads(2), ThreadPoolExecutor(1) as pool:
        want = bytes_of(everything(engine, c, torch.float32))
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                running.meta_gradient(busy.params, busy.rates, busy.tasks, steps=3)

        done = pool.submit(work)
        try:
            for _ in range(3):
                assert from_child(_compute, engine, c, [2, 1]) == [want] * 2
        finally:
            stop.set()
        done.result(timeout=60)


def test_engines_of_one_model_share_nothing():
    c = case("linear-9to15")
    first, second = native(c), native(c)
    results = first.adapt(
        c.params, c.rates, c.tasks.support_x, c.tasks.support_y, steps=2
    )
    kept = cast(results, torch.float64)
    kept = {n: r.clone() for n, r in kept.items()}
    everything(second, c)
    everything(first, c)
    assert_same_bits(results, kept)


@pytest.mark.parametrize("sizes", [(3, 20, 6), (20, 36, 100, 3), (5, 34, 18)], ids=str)
@both_dtypes
def test_a_sample_is_as_alone_beside_any_others(sizes, dtype):
    """Whichever tile its row falls to and whichever rows share a register with it."""

    def build() -> nn.Module:
        pairs = zip(sizes, sizes[1:], strict=False)
        return nn.Sequential(*(nn.Linear(a, b) for a, b in pairs))

    c = case(Problem(f"rows-{sizes}", build, sizes[:1], sizes[-1], samples=23))
    engine, params = native(c), cast(c.own, dtype)
    x = c.tasks.support_x.to(dtype)
    alone = [engine.forward(params, x[:, [i]]).clone() for i in range(x.shape[1])]
    for count in (2, 3, 4, 5, 7, 8, 9, 13, 23):
        together = engine.forward(params, x[:, -count:].contiguous())
        assert torch.equal(together, torch.cat(alone[-count:], dim=1)), count
