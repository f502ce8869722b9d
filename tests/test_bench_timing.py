"""Contenders are timed in turns, and compared where both were; no test takes times."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: fastmaml itself comes from where it is installed

from bench import timing  # noqa: E402


def test_interleaving_is_fair_and_spreads_the_slow():
    calls = {"fast": lambda: None, "other": lambda: None}
    plan = timing.Plan(rounds=6, min_rounds=2, min_sample=1e-5, pause=0.0, budget=1.0)
    times = timing.interleave(calls, plan)
    assert [sorted(t) for t in times.values()] == [list(range(6))] * 2
    stingy = timing.Plan(rounds=6, min_rounds=2, min_sample=1e-5, pause=0.0, budget=0)
    assert sorted(timing.interleave(calls, stingy)["fast"]) == [0, 5]


@pytest.mark.parametrize("rounds", [6, 25])
def test_contenders_meet_as_often_as_the_slower_one_is_timed(rounds):
    attended = [timing.attended(share, rounds) for share in range(1, rounds + 1)]
    for fewer, more in pairwise(attended):
        assert len(more) == len(fewer) + 1 and set(fewer) < set(more)
    for at in attended:  # no part of the time goes without them
        gaps = [b - a for a, b in pairwise([*at, at[0] + rounds])]
        assert sum(gaps) == rounds and max(gaps) <= 2.7 * rounds / len(at)


def test_every_sample_follows_a_call_that_is_not_timed():
    seen = []
    plan = timing.Plan(rounds=4, min_rounds=4, min_sample=1e-12, pause=0.0, budget=1.0)
    timing.interleave({"slow": lambda: seen.append(None)}, plan)
    assert len(seen) == 1 + 4 * 2


def test_summaries_and_ratios():
    summary = timing.summarize([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (summary.lower, summary.median, summary.upper) == (2.0, 3.0, 4.0)
    ratio = timing.ratio({0: 2.0, 1: 9.0, 2: 8.0}, {0: 1.0, 2: 2.0})
    assert (ratio.median, ratio.samples) == (3.0, 2)
    with pytest.raises(ValueError, match="samples"):
        timing.summarize([])


def test_cycle_takes_inputs_in_turn():
    seen = []
    call = timing.cycle(seen.append, "abc")
    for _ in range(4):
        call()
    assert sorted(seen[:3]) == list("abc") and seen[3] == seen[0]
