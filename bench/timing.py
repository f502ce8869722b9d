"""Timing several contenders against each other in one process.

A machine's speed drifts with clock, neighbours and temperature, so contenders are
never timed one after the other: every round times each of them once, in a fresh
random order, and ratios are taken within a round. A sample is the mean of as many
calls as fill ``Plan.min_sample`` seconds, cycling through several meta-batches so
that no contender works on data it has just left in the cache.

Thread pools of torch, JAX and fastmaml keep their workers spinning for a while after
the work is done and would steal a core from whoever comes next; before each sample
there is a pause for them to fall asleep and one call, not timed, to wake the pool
that is needed. ``solo`` times a contender with no other contender in between; the
ratio of the two medians stands in the results and should be near one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Call = Callable[[], object]
Finish = Callable[[object], object]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: most samples of a contender.
        min_rounds: samples that even the slowest gets.
        budget: seconds for one contender; slow ones sit out some rounds.
        min_sample: least seconds of one sample.
        pause: seconds of quiet before each sample.
    """

    rounds: int = 25
    min_rounds: int = 3
    budget: float = 10.0
    min_sample: float = 0.05
    pause: float = 0.02


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of samples.

    Attributes:
        median: in the samples' unit.
        lower: first quartile.
        upper: third quartile.
        samples: how many there are.
    """

    median: float
    lower: float
    upper: float
    samples: int


def summarize(samples: Sequence[float]) -> Summary:
    """Returns median and quartiles.

    Raises:
        ValueError: if there are no samples.
    """
    if not samples:
        raise ValueError("samples: got none, expected at least one")
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0], 1)
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, lower, upper, len(samples))


@dataclass(frozen=True)
class Asynchronous:
    """A call that returns before its work is done, as on a GPU.

    Attributes:
        start: puts the work into a queue.
        finish: takes what ``start`` returned, and returns when the work is done.
    """

    start: Call
    finish: Finish

    def __call__(self) -> object:
        """Starts, and waits for nothing."""
        return self.start()


def finishing(call: Call, finish: Finish | None) -> Call:
    """Returns the call with how to wait for it; ``None``: it is done on return."""
    return call if finish is None else Asynchronous(call, finish)


def cycle(
    function: Callable[[Any], object],
    inputs: Sequence[object],
    finish: Finish | None = None,
) -> Call:
    """Returns a call without arguments that takes the inputs in turn."""
    state = {"next": 0}

    def call() -> object:
        state["next"] = (state["next"] + 1) % len(inputs)
        return function(inputs[state["next"]])

    return finishing(call, finish)


def time_call(call: Call, repeats: int) -> float:
    """Returns the mean seconds of a call over ``repeats`` calls.

    Calls that are asynchronous follow each other without a wait, as in a training loop,
    and the clock stops when the last is done.
    """
    finish = call.finish if isinstance(call, Asynchronous) else None
    start = time.perf_counter()
    for _ in range(repeats):
        last = call()
    if finish is not None:
        finish(last)
    return (time.perf_counter() - start) / repeats


def _repeats(seconds: float, plan: Plan) -> int:
    return max(1, round(plan.min_sample / max(seconds, 1e-9)))


def _sample(call: Call, repeats: int, plan: Plan) -> float:
    time.sleep(plan.pause)
    time_call(call, 1)  # behind a slow contender even 0.2 s took 0.27 s at once
    return time_call(call, repeats)


def _warm_up(call: Call, plan: Plan) -> float:
    """Returns the seconds of a warm call; a slow one is warm after its first."""
    first = time_call(call, 1)
    if first > plan.min_sample:
        return first
    return min(time_call(call, 1) for _ in range(3))


def attended(share: int, rounds: int) -> list[int]:
    """Returns the rounds in which a contender with ``share`` samples is timed.

    They are spread out, and those of a smaller share are among those of a larger one:
    two contenders meet in as many rounds as the slower one has.
    """
    golden = (5**0.5 - 1) / 2  # multiples of it, modulo 1, spread evenly
    return sorted(sorted(range(rounds), key=lambda n: n * golden % 1)[:share])


def interleave(
    calls: Mapping[str, Call], plan: Plan, seed: int = 0
) -> dict[str, dict[int, float]]:
    """Times contenders round by round.

    Args:
        calls: name -> call; each has been called before (compiled, allocated).
        plan: how long to measure.
        seed: of the order within the rounds.

    Returns:
        name -> {round: seconds of one call}.
    """
    once = {name: _warm_up(call, plan) for name, call in calls.items()}
    repeats = {name: _repeats(seconds, plan) for name, seconds in once.items()}
    attends = {}
    for name, seconds in once.items():
        affordable = int(plan.budget / max(seconds * repeats[name], plan.min_sample))
        share = min(plan.rounds, max(plan.min_rounds, affordable))
        attends[name] = attended(share, plan.rounds)
    order = random.Random(seed)
    times: dict[str, dict[int, float]] = {name: {} for name in calls}
    for number in range(plan.rounds):
        present = [n for n in calls if number in attends[n]]
        for name in order.sample(present, len(present)):
            times[name][number] = _sample(calls[name], repeats[name], plan)
    return times


def solo(call: Call, plan: Plan) -> list[float]:
    """Times one contender alone, three samples."""
    repeats = _repeats(_warm_up(call, plan), plan)
    return [_sample(call, repeats, plan) for _ in range(3)]


def ratio(slow: Mapping[int, float], fast: Mapping[int, float]) -> Summary:
    """Summary of ``slow / fast`` over the rounds in which both were timed.

    Raises:
        ValueError: if there is no such round.
    """
    return summarize([slow[r] / fast[r] for r in sorted(slow.keys() & fast.keys())])
