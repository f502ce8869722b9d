"""The loop: what it does at each iteration, and how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fastmaml import _native
from fastmaml.engines import StepMetrics
from fastmaml.learners.base import Evaluation
from fastmaml.tasks import Sinusoid, TaskBatch
from fastmaml.train import DivergenceError, FitResult, fit, load_checkpoint
from fastmaml.train.evaluate import evaluate_tasks
from fastmaml.train.logging import MetricsLog, Progress, clock, read_metrics
from fastmaml.train.watch import LossWatch, set_threads


class Quadratic:
    """The smallest learner: the loss is the mean of (w - target)^2."""

    def __init__(self, start: float = 2.0, classes: bool = False) -> None:
        self.w = torch.nn.Parameter(torch.tensor([start, 0.0]))
        self.classes = classes
        self.calls = 0
        self.poison: dict[int, float] = {}
        self.last: Any = None
        self.script: list[float] = []
        self.rows: list[list[float]] = []

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.w]

    def meta_loss(self, tasks: TaskBatch) -> Tensor:
        self.calls += 1
        accuracy = torch.tensor([[0.0, 0.25], [0.0, 0.75]]) if self.classes else None
        self.last = SimpleNamespace(query_accuracy=accuracy)
        loss = self.w.square().sum() + 0 * tasks.query_x.mean()
        return loss * self.poison.get(self.calls, 1.0)

    def backward(self, tasks: TaskBatch, *, accumulate: bool = True) -> Tensor:
        if not accumulate:
            self.w.grad = None
        loss = self.meta_loss(tasks)
        loss.backward()
        return loss.detach()

    def evaluate(
        self, tasks: TaskBatch, steps: int | None = None, inductive: bool = False
    ) -> Evaluation:
        value = self.script.pop(0) if self.script else float(self.w.detach()[0])
        each = tasks.query_y[:, :1, 0] * 0 + torch.tensor([9.0, value])
        accuracy = each / 10 if self.classes else None
        return Evaluation(
            loss=each.mean(0),
            loss_interval=each.std(0),
            accuracy=None if accuracy is None else accuracy.mean(0),
            accuracy_interval=None if accuracy is None else accuracy.std(0),
            per_task_loss=each,
            per_task_accuracy=accuracy,
            tasks=len(tasks),
            queries=tasks.query_size,
            transductive=not inductive,
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {"w": self.w.detach()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.w.data.copy_(state["w"])


def _fit(learner: Quadratic, iterations: int = 20, **options: Any) -> FitResult:
    optimizer = options.pop("optimizer", None) or torch.optim.SGD([learner.w], 0.01)
    tasks = Sinusoid(support=2, queries=2)
    options = {"progress": False, "tensorboard": False, "meta_batch": 2} | options
    return fit(learner, tasks, optimizer, iterations=iterations, **options)


def test_it_trains_and_counts() -> None:
    learner = Quadratic()
    result = _fit(learner, 50, log_every=10)
    assert learner.calls == result.iteration == 50
    assert result.finished and not result.interrupted and result.run_dir is None
    assert learner.w[0].item() == pytest.approx(2 * 0.98**50, rel=1e-4)
    assert [row["iteration"] for row in result.history] == [10, 20, 30, 40, 50]


def test_rows_are_means_over_their_iterations() -> None:
    learner = Quadratic(classes=True)
    history = _fit(learner, 7, log_every=5).history
    losses = [(2 * 0.98**i) ** 2 for i in range(7)]
    assert history[0]["loss"] == pytest.approx(sum(losses[:5]) / 5, rel=1e-5)
    assert history[1]["loss"] == pytest.approx(sum(losses[5:]) / 2, rel=1e-5)
    assert history[0]["accuracy"] == pytest.approx(0.5)


def test_the_gradient_is_clipped_elementwise_on_both_sides() -> None:
    learner = Quadratic()
    learner.w.data = torch.tensor([20.0, -20.0])
    _fit(learner, 1, clip_gradient=10.0)
    assert learner.w.tolist() == pytest.approx([19.9, -19.9])


def test_the_schedule_moves_once_an_iteration_and_is_resumed(tmp_path: Path) -> None:
    def run(learner: Quadratic, iterations: int, out: Path, resume: bool) -> list[Any]:
        optimizer = torch.optim.SGD([learner.w], 0.1)
        schedule = LambdaLR(optimizer, lambda i: 0.5**i)
        options = {"schedule": schedule, "run_dir": out, "resume": resume}
        _fit(learner, iterations, optimizer=optimizer, log_every=1, **options)
        return [row["learning_rate"] for row in read_metrics(out)]

    rates = run(Quadratic(), 4, tmp_path / "a", False)
    assert rates == pytest.approx([0.05, 0.025, 0.0125, 0.00625])
    run(Quadratic(), 2, tmp_path / "b", False)
    assert run(Quadratic(), 4, tmp_path / "b", True) == rates


@pytest.mark.parametrize(
    ("classes", "best"),
    [(False, (1.0, 10)), (True, (0.5, 5))],
    ids=["loss", "accuracy"],
)
def test_the_best_is_kept_low_loss_or_high_accuracy(
    tmp_path: Path, classes: bool, best: tuple[float, int]
) -> None:
    learner = Quadratic(classes=classes)
    learner.script = [5.0, 1.0, 3.0]
    tasks = Sinusoid(2, 2).fixed(4)
    options = {"validation": tasks, "validate_every": 5, "run_dir": tmp_path / "r"}
    result = _fit(learner, 15, **options)
    assert result.best == pytest.approx(best[0]) and result.best_iteration == best[1]
    assert load_checkpoint(tmp_path / "r" / "best.pt").iteration == best[1]
    assert load_checkpoint(tmp_path / "r" / "last.pt").iteration == 15
    rows = [r for r in read_metrics(tmp_path / "r") if r["kind"] == "validation"]
    assert [row["loss"][-1] for row in rows] == [5.0, 1.0, 3.0]


def test_the_best_loss_is_the_mean_after_one_step_and_more(tmp_path: Path) -> None:
    class Steps(Quadratic):
        def evaluate(self, tasks: TaskBatch, **options: Any) -> Evaluation:
            each = torch.tensor([self.rows.pop(0)]).expand(len(tasks), -1)
            metrics = StepMetrics(each.contiguous())
            return Evaluation.of(metrics, tasks.query_size, True)

    learner = Steps()
    learner.rows = [[0.0, 2.0, 4.0], [9.0, 3.0, 1.0], [0.0, 4.0, 0.5]]
    options = {"validation": Sinusoid(2, 2).fixed(4), "validate_every": 5}
    result = _fit(learner, 15, **options)
    assert (result.best, result.best_iteration) == (2.0, 10)


def test_an_overflowing_validation_is_logged_as_null_and_never_best(
    tmp_path: Path,
) -> None:
    learner = Quadratic()
    learner.script = [float("inf"), 3.0, float("nan")]
    options = {"validation": Sinusoid(2, 2).fixed(4), "validate_every": 5}
    result = _fit(learner, 15, run_dir=tmp_path / "r", tensorboard=None, **options)
    assert (result.best, result.best_iteration) == (3.0, 10)
    rows = [r for r in read_metrics(tmp_path / "r") if r["kind"] == "validation"]
    assert [row["loss"][-1] for row in rows] == [None, 3.0, None]


def test_the_best_so_far_is_remembered_on_resuming(tmp_path: Path) -> None:
    options = {"validation": Sinusoid(2, 2).fixed(4), "run_dir": tmp_path / "r"}
    for script, iterations in (([1.0], 10), ([5.0], 20)):
        learner = Quadratic()
        learner.script = script
        result = _fit(learner, iterations, resume=iterations > 10, **options)
    assert (result.best, result.best_iteration) == (1.0, 10)
    assert load_checkpoint(tmp_path / "r" / "best.pt").iteration == 10


def test_a_nan_loss_stops_before_the_step_and_names_the_checkpoint(
    tmp_path: Path,
) -> None:
    learner = Quadratic()
    learner.poison[18] = float("nan")
    good = rf"iteration 18: the loss is nan; .*{tmp_path}.*last.pt \(iteration 15\)"
    with pytest.raises(DivergenceError, match=good):
        _fit(learner, 40, run_dir=tmp_path / "r", checkpoint_every=5)
    assert learner.w[0].item() == pytest.approx(2 * 0.98**17, rel=1e-4)
    assert load_checkpoint(tmp_path / "r" / "last.pt").iteration == 15


def test_non_finite_parameters_stop_and_are_not_saved(tmp_path: Path) -> None:
    learner = Quadratic()
    optimizer = torch.optim.SGD([learner.w], 3e38)
    with pytest.raises(DivergenceError, match=r"parameter is not finite.*iteration 0"):
        _fit(learner, 1, optimizer=optimizer, run_dir=tmp_path / "r")
    assert torch.equal(
        load_checkpoint(tmp_path / "r" / "last.pt").learner["w"],
        torch.tensor([2.0, 0.0]),
    )


def test_a_growing_loss_stops() -> None:
    learner = Quadratic()
    optimizer = torch.optim.SGD([learner.w], 1.1)
    with pytest.raises(DivergenceError, match=r"more than 100 times"):
        _fit(learner, 2000, optimizer=optimizer, divergence_factor=100.0)
    assert learner.calls < 60


def test_a_spike_does_not_stop() -> None:
    watch = LossWatch(1000.0)
    learner = SimpleNamespace(last=None)
    values = [3.0] * 30 + [5000.0] + [3.0] * 30
    assert all(watch.add(torch.tensor(v), learner) for v in values)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_running_iteration(
    tmp_path: Path, number: signal.Signals
) -> None:
    learner = Quadratic()

    def interrupt(row: dict[str, Any]) -> None:
        if row["iteration"] == 12:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = _fit(learner, 100, run_dir=tmp_path / "r", log_every=4, on_log=interrupt)
    assert result.interrupted and not result.finished
    last = load_checkpoint(tmp_path / "r" / "last.pt")
    assert last.iteration == result.iteration == 12
    assert torch.equal(last.learner["w"], learner.w.detach())
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_interrupts_at_once() -> None:
    class Stuck(Quadratic):
        def meta_loss(self, tasks: TaskBatch) -> Tensor:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().meta_loss(tasks)

    with pytest.raises(KeyboardInterrupt):
        _fit(Stuck(), 10)


def test_it_trains_outside_the_main_thread() -> None:
    results: list[FitResult] = []
    thread = threading.Thread(target=lambda: results.append(_fit(Quadratic(), 5)))
    thread.start()
    thread.join()
    assert results[0].finished


def test_resuming_restores_all_of_it(tmp_path: Path) -> None:
    def run(iterations: int, out: Path, resume: bool) -> Quadratic:
        learner = Quadratic()
        optimizer = torch.optim.Adam([learner.w], 0.1)
        options = {"optimizer": optimizer, "run_dir": out, "resume": resume}
        _fit(learner, iterations, log_every=6, **options)
        return learner

    straight = run(30, tmp_path / "a", False)
    run(15, tmp_path / "b", False)
    assert torch.equal(run(30, tmp_path / "b", True).w, straight.w)
    states = [load_checkpoint(tmp_path / x / "last.pt") for x in "ab"]
    assert states[0].sampler == states[1].sampler
    assert states[0].sampler["task"] == 30 * 2


def test_refusals(tmp_path: Path) -> None:
    run = tmp_path / "r"
    _fit(Quadratic(), 10, run_dir=run)
    with pytest.raises(ValueError, match="already holds a run"):
        _fit(Quadratic(), 10, run_dir=run)
    with pytest.raises(ValueError, match="at iteration 10, past iterations=5"):
        _fit(Quadratic(), 5, run_dir=run, resume=True)
    with pytest.raises(ValueError, match="needs the run_dir"):
        _fit(Quadratic(), 5, resume=True)
    for name in ("meta_batch", "log_every", "validate_every", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            _fit(Quadratic(), 5, **{name: 0})
    with pytest.raises(ValueError, match="clip_gradient must be positive"):
        _fit(Quadratic(), 5, clip_gradient=-1.0)
    with pytest.raises(ValueError, match="divergence_factor must be above 1"):
        _fit(Quadratic(), 5, divergence_factor=1.0)


def test_asking_for_tensorboard_without_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        MetricsLog(tmp_path, tensorboard=True)
    MetricsLog(tmp_path, tensorboard=None).close()


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    options = {"validation": Sinusoid(2, 2).fixed(4), "validate_every": 10}
    _fit(Quadratic(), 10, run_dir=tmp_path, log_every=5, tensorboard=True, **options)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
    found = events.Scalars("train/loss")
    assert [e.step for e in found] == [5, 10]
    assert [e.value for e in found] == pytest.approx([row["loss"] for row in rows])
    assert "validation/loss_after_1_steps" in events.Tags()["scalars"]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write({"kind": "train", "iteration": 1, "loss": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.5]
    log.close()


def test_threads_reach_torch_and_the_native_engine() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(1)
        assert torch.get_num_threads() == 1
        if _native.unavailable() is None:
            assert _native.core().num_threads() == 1
    finally:
        set_threads(before)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        set_threads(0)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_anything_else_lines() -> None:
    shown = {}
    for stream in (_Terminal(), io.StringIO()):
        progress = Progress(200, start=100, stream=stream)
        progress.show(150, 1.25, 0.5)
        progress.close()
        shown[type(stream)] = stream.getvalue()
    for text in shown.values():
        assert "150/200" in text and "loss 1.25, accuracy 50.0%" in text
        assert "meta-steps/s" in text
    assert "\r" in shown[_Terminal] and "\r" not in shown[io.StringIO]
    assert "left" in shown[io.StringIO]


def test_no_progress_means_silence(capsys: pytest.CaptureFixture[str]) -> None:
    _fit(Quadratic(), 5, validation=Sinusoid(2, 2).fixed(2))
    assert capsys.readouterr() == ("", "")


def test_clock() -> None:
    assert [clock(s) for s in (0, 61.6, 3661)] == ["0:00", "1:02", "1:01:01"]


def test_evaluating_in_parts_equals_the_whole() -> None:
    class ByTask(Quadratic):
        def evaluate(self, tasks: TaskBatch, **options: Any) -> Evaluation:
            found = super().evaluate(tasks, **options)
            each = tasks.query_y.mean(1)
            return type(found)(**(vars(found) | {"per_task_loss": each}))

    tasks = Sinusoid(2, 3).fixed(25)
    found = evaluate_tasks(ByTask(), tasks, chunk=7)
    each = tasks.query_y.mean(1)
    assert found.tasks == 25 and torch.equal(found.per_task_loss, each)
    assert torch.allclose(found.loss, each.mean(0))
    spread = each.std(0, unbiased=False) / 5
    assert torch.allclose(found.loss_interval, 1.96 * spread)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        evaluate_tasks(ByTask(), tasks, chunk=0)
    with pytest.raises(ValueError, match="tasks is empty"):
        evaluate_tasks(ByTask(), [])
