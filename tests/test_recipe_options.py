"""Options beyond the paper's: decay of the outer rate, the head, torch's threads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from command import inside, train

from fastmaml import _native, models
from fastmaml.recipes import recipe


def _rates(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["learning_rate"] for row in rows if row["kind"] == "train"]


def test_the_outer_rate_decays_along_a_cosine(tmp_path: Path) -> None:
    words = ("--iterations", 4, "--log-every", 1, "--meta-lr-decay", "cosine")
    done = inside(*train("sinusoid", tmp_path / "run", *words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    half = 0.5**0.5
    want = [1e-3 * (1 + c) / 2 for c in (half, 0, -half, -1)]
    assert _rates(tmp_path / "run") == pytest.approx(want, abs=1e-9)


def test_the_outer_rate_is_constant_unless_asked(tmp_path: Path) -> None:
    words = ("--iterations", 3, "--log-every", 1)
    done = inside(*train("sinusoid", tmp_path / "run", *words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert _rates(tmp_path / "run") == [1e-3] * 3


@pytest.mark.parametrize("decay", ["cosine", "none"])
def test_only_a_constant_rate_lets_a_run_grow_longer(
    decay: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("--iterations", 3, "--meta-lr-decay", decay, "--no-plots")
    assert inside(*train("sinusoid", run, *words), cwd=tmp_path).returncode == 0
    more = ("train", "sinusoid", "--resume", run, "--iterations", 5)
    done = inside(*more, cwd=tmp_path)
    if decay == "none":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2
        assert "--iterations was 3" in done.stderr + done.stdout


def test_the_spread_of_the_omniglot_head() -> None:
    heads = []
    for std in (1.0, 0.1):
        torch.manual_seed(0)
        heads.append(models.omniglot_conv(5, head_std=std)[-1].weight.detach())
    torch.testing.assert_close(heads[1], 0.1 * heads[0])
    settings = recipe("omniglot").from_preset("paper")
    assert settings.head_std == 1.0


@pytest.mark.skipif(_native.unavailable() is not None, reason="not built")
def test_torch_keeps_one_thread_beside_the_native_engine_alone() -> None:
    before = torch.get_num_threads()
    kind = recipe("sinusoid")
    try:
        torch.set_num_threads(2)
        kind(engine="functional").build()
        assert torch.get_num_threads() == 2
        kind(engine="native").build()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_recorded_run_becomes_a_row_of_the_table(tmp_path: Path) -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from bench.record_run import record
    from bench.results_table import row

    run = tmp_path / "run"
    done = inside(*train("sinusoid", run, "--iterations", 2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    options = argparse.Namespace(
        experiment="waves", published="0.67", command="fastmaml train", steps=[1]
    )
    recorded = record(run, options)
    assert recorded["measure"] == "loss" and recorded["seconds"] > 0
    first = json.loads((run / "evaluation.json").read_text())["rows"][0]
    text = row(json.loads(json.dumps(recorded)))
    assert "| waves | 0.67 |" in text and f"{first['loss'][1]:.3f} ±" in text
