"""An evaluation whose inner loop diverged says so, in a table that stays one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY

from fastmaml import MAML, cli
from fastmaml.learners.evaluation import divergence, interval_of
from fastmaml.models import sinusoid_mlp
from fastmaml.recipes import recipe
from fastmaml.recipes.evaluation import format_table
from fastmaml.tasks import Sinusoid
from fastmaml.train.evaluate import figures, sentence

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("numbers", "cell"),
    [
        ((0.5, 0.25), "0.50 ± 0.25"),
        ((-9999.0, 123.4), "-9999.00 ± 123.40"),
        ((5.49e16, 3.6e13), "5.5e+16 ± 3.6e+13"),
        ((1.0, INF), "1.00 ± inf"),
        ((1.0, None), "1.00 ± inf"),
        *(((bad, 1.0), "diverged") for bad in (NAN, INF, -INF, None)),
    ],
)
def test_numbers_of_any_size_are_short(numbers: tuple[Any, Any], cell: str) -> None:
    assert interval_of(*numbers) == cell


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ([3.0, 1.0, 0.5], None),
        ([3.0, 2999.0], None),
        ([3.0, 1.0, 3001.0, NAN], "after 2 inner steps the loss is over 1000 times"),
        ([3.0, None], "after 1 inner step the loss is not finite"),
        ([INF, 1.0], "not finite even before adapting"),
        ([0.0, 0.9], None),
        ([-2.0, -5.0], None),
    ],
)
def test_divergence_is_told_in_words(loss: list[float], said: str | None) -> None:
    found = divergence(loss)
    assert found is None if said is None else said in str(found)


def test_a_diverged_evaluation_prints_a_table() -> None:
    torch.manual_seed(0)
    learner = MAML(sinusoid_mlp(), loss="mse", inner_lr=3.0)
    found = learner.evaluate(Sinusoid().sample(5), steps=60)
    assert not math.isfinite(found.loss[-1])
    lines = str(found).splitlines()
    assert lines[-2].split() == ["60", "diverged"]
    assert lines[-1].startswith("diverged: after ") and "±" in lines[2]
    assert max(map(len, lines)) < 80
    assert "loss not finite (diverged) after 60 steps" in sentence(found)
    assert figures(found)["loss"][-1] is None


def test_the_command_says_that_a_run_diverged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [*TINY["sinusoid"], "--iterations", "3", "--inner-lr", "3", "--no-plots"]
    train = ["train", "sinusoid", "--out", str(run), "--no-progress", *words]
    assert cli.main(train) == 0
    assert cli.main(["evaluate", str(run), "--tasks", "9", "--steps", "60"]) == 0
    out = capsys.readouterr().out
    for shots in (5, 10, 20):
        assert out.count(f"{shots}-shot diverged: after ") == 2
    assert max(map(len, out.splitlines())) < 140

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    text = (run / "evaluation.json").read_text()
    rows = json.loads(text, parse_constant=refuse)["rows"]
    assert rows[0]["loss"][60] is None


def test_a_table_of_accuracies_says_it_too() -> None:
    settings = recipe("omniglot").from_preset("paper")
    row = {"ways": 5, "shots": 1, "tasks": 600, "queries": 5, "subset": "test"}
    row |= {"transductive": True, "loss": [1.6, None], "accuracy": [0.2, 0.2]}
    row |= {"accuracy_interval": [0.01, 0.01]}
    record = {"checkpoint": "best.pt", "iteration": 60_000, "rows": [row]}
    table = format_table(settings, record)
    assert "diverged: after 1 inner step the loss is not finite" in table
