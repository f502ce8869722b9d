"""The command line as users meet it: a process, its output and its exit code."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from command import fastmaml, inside, start, train

from fastmaml import cli
from fastmaml.train import load_checkpoint
from fastmaml.train.logging import read_metrics


@pytest.fixture(scope="module")
def sinusoid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, with its output beside it."""
    folder = tmp_path_factory.mktemp("sinusoid")
    done = fastmaml(
        *train("sinusoid", folder / "run", "--iterations", 30, "--log-every", 10),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    (folder / "out.txt").write_text(done.stdout)
    (folder / "err.txt").write_text(done.stderr)
    return folder / "run"


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glyphs")
    done = inside(
        *train("glyphs", folder / "run", "--iterations", 6, "--log-every", 3),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    (folder / "out.txt").write_text(done.stdout)
    return folder / "run"


def test_a_run_tells_its_settings_engine_and_folder(sinusoid: Path) -> None:
    out = (sinusoid.parent / "out.txt").read_text()
    assert "fastmaml train sinusoid, preset paper" in out
    assert "inner_lr 0.01" in out and "meta_batch 25" in out
    assert " engine on cpu" in out
    assert f"run: {sinusoid}" in out
    assert "30/30: loss" in (sinusoid.parent / "err.txt").read_text()


def test_a_run_leaves_what_it_should(sinusoid: Path) -> None:
    for name in ("settings.json", "metrics.jsonl", "last.pt", "best.pt"):
        assert (sinusoid / name).is_file(), name
    assert {p.name for p in (sinusoid / "plots").iterdir()} == {
        "learning_curve.png",
        "sinusoid.png",
    }
    settings = json.loads((sinusoid / "settings.json").read_text())
    assert settings["experiment"] == "sinusoid"
    assert settings["settings"]["iterations"] == 30
    assert load_checkpoint(sinusoid / "last.pt").settings["meta_batch"] == 25


def test_the_table_stands_beside_the_papers_figures(sinusoid: Path) -> None:
    out = (sinusoid.parent / "out.txt").read_text()
    assert "mean ± 95% over 20 tasks of 100 queries" in out
    for shots in (5, 10, 20):
        assert f"{shots}-shot, this run" in out
    paper = next(line for line in out.splitlines() if "paper, MAML" in line)
    assert paper.split()[-3:] == ["0.67", "0.38", "0.35"]
    record = json.loads((sinusoid / "evaluation.json").read_text())
    assert [row["shots"] for row in record["rows"]] == [5, 10, 20]
    assert all(len(row["loss"]) == 11 for row in record["rows"])


def test_evaluate_takes_its_options(sinusoid: Path) -> None:
    words = ("--tasks", 15, "--steps", 2, "--shots", 7, "--queries", 9)
    words += ("--checkpoint", "last")
    done = inside("evaluate", sinusoid, *words, cwd=sinusoid.parent)
    assert done.returncode == 0, done.stderr
    assert (
        "7-shot, this run" in done.stdout and "last.pt at iteration 30" in done.stdout
    )
    (row,) = json.loads((sinusoid / "evaluation.json").read_text())["rows"]
    assert (row["shots"], row["tasks"], row["queries"]) == (7, 15, 9)
    assert len(row["loss"]) == 3


def test_evaluate_twice_gives_the_same_and_another_seed_other_tasks(
    sinusoid: Path,
) -> None:
    found = []
    for seed in (0, 0, 1):
        words = ("--tasks", 10, "--steps", 1, "--seed", seed)
        assert cli.main(["evaluate", str(sinusoid), *map(str, words)]) == 0
        found.append(json.loads((sinusoid / "evaluation.json").read_text())["rows"])
    assert found[0] == found[1] != found[2]


def test_image_rows_name_queries_trials_and_mode(glyphs: Path) -> None:
    out = (glyphs.parent / "out.txt").read_text()
    assert "glyphs 5-way 1-shot accuracy in %, mean ± 95% over 6 tasks (test)" in out
    assert "1 query per class, transductive" in out
    words = ("--tasks", 4, "--inductive", "--subset", "val", "--queries", 2)
    done = inside("evaluate", glyphs, *words, cwd=glyphs.parent)
    assert "over 4 tasks (val)" in done.stdout
    assert "2 queries per class, inductive" in done.stdout
    (row,) = json.loads((glyphs / "evaluation.json").read_text())["rows"]
    assert row["transductive"] is False and row["queries"] == 10
    assert all(0 <= value <= 1 for value in row["accuracy"])


def test_validation_and_accuracy_are_in_the_log(glyphs: Path) -> None:
    rows = read_metrics(glyphs)
    train_rows = [row for row in rows if row["kind"] == "train"]
    assert [row["iteration"] for row in train_rows] == [3, 6]
    assert all(0 <= row["accuracy"] <= 1 for row in train_rows)
    (validation,) = [row for row in rows if row["kind"] == "validation"]
    assert len(validation["accuracy"]) == 4  # after 0, 1, 2, 3 steps


def test_plot_draws_again(glyphs: Path) -> None:
    for path in (glyphs / "plots").iterdir():
        path.unlink()
    done = inside("plot", glyphs, "--checkpoint", "last", cwd=glyphs.parent)
    assert done.returncode == 0, done.stderr
    assert "task.png" in done.stdout and "learning_curve.png" in done.stdout
    assert (glyphs / "plots" / "task.png").stat().st_size > 10_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_exits_with_130_and_says_how_to_resume(
    tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    words = ("--iterations", 100_000, "--log-every", 5)
    process = start(*train("sinusoid", run, *words), cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not read_metrics(run):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"fastmaml train sinusoid --resume {run}" in out
    assert "Traceback" not in errors
    stopped = load_checkpoint(run / "last.pt").iteration
    assert stopped >= 5 and f"after iteration {stopped:,}" in out
    more = ("train", "sinusoid", "--resume", run, "--iterations", stopped + 5)
    done = inside(*more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(run / "last.pt").iteration == stopped + 5


def test_divergence_is_one_line_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--iterations", 500, "--meta-lr", 1e30, "--checkpoint-every", 1000)
    done = inside(*train("sinusoid", run, *words), cwd=tmp_path)
    assert done.returncode == 2
    assert "training diverged at iteration" in done.stderr
    assert f"{run / 'last.pt'} (iteration 0)" in done.stderr
    assert "Traceback" not in done.stderr


def _one_line(words: list[str], message: str, capsys: Any) -> None:
    assert cli.main(words) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("fastmaml: ") and len(errors.splitlines()) == 1


def test_an_error_ends_the_process_with_2_and_no_traceback(tmp_path: Path) -> None:
    done = fastmaml("train", "sinusoid", "--iterations", "ten", cwd=tmp_path)
    assert done.returncode == 2
    assert "'ten'" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "nowhere"], "no run in nowhere"),
        (["plot", "nowhere"], "no run in nowhere"),
        (["train", "sinusoid", "--resume", "nowhere"], "no run in nowhere"),
        (["train", "omniglot"], "omniglot needs --data DIR"),
        (["train", "mini-imagenet"], "mini-imagenet needs --data DIR"),
        (["train", "omniglot", "--data", "nowhere"], "nowhere"),
        (["train", "mini-imagenet", "--data", "nowhere"], "nowhere"),
        (["train", "cifar"], "no experiment 'cifar'"),
        (["fly"], "no command 'fly'"),
        (["train", "sinusoid", "--meta-batch", "0"], "must be at least 1"),
        (["train", "sinusoid", "--inner-lr", "nan"], "inner_lr"),
        (["train", "sinusoid", "--threads", "0"], "threads must be at least 1"),
        (["train", "sinusoid", "--iterations", "ten"], "'ten'"),
        (["train", "sinusoid", "--preset", "fast"], "fast"),
        (["train", "sinusoid", "--device", "cuda:99"], "device='cuda:99'"),
        (["train", "sinusoid", "--device", "gpu"], "device='gpu'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_errors_of_the_user_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _one_line(words, message, capsys)
    assert not list(tmp_path.iterdir()), "a run that never began left files"


def test_a_run_is_not_overwritten_nor_resumed_as_another(
    sinusoid: Path, glyphs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = str(sinusoid), str(glyphs)
    _one_line(["train", "sinusoid", "--out", run], "already holds a run", capsys)
    _one_line(["train", "sinusoid", "--resume", other], "is a run of glyphs", capsys)
    words = ["train", "sinusoid", "--resume", run, "--inner-lr", "0.5"]
    _one_line(words, "--inner-lr was 0.01", capsys)


def test_help_lists_every_option_with_its_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("sinusoid", "glyphs", "omniglot", "mini-imagenet"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for option in ("--preset", "--resume", "--out", "--engine", "--inner-lr"):
            assert option in text
        assert "learning rate of the inner loop" in text


def test_the_command_alone_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    for command in ("train", "evaluate", "plot", "info", "bench"):
        assert command in capsys.readouterr().out or cli.main(["--help"]) == 0
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("fastmaml ")


def test_info_runs(tmp_path: Path) -> None:
    done = fastmaml("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fastmaml" in done.stdout and "native engine" in done.stdout
