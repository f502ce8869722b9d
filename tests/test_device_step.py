"""Training where nobody waits for the device: the same runs, by `fit`.

On `cpu_lockstep` and the emulation all but the graph itself is as on a GPU, where the
same tests capture and replay it.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import backends
import pytest
import torch
from test_device_sampling import kernels_of
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from fastmaml import MAML, optim
from fastmaml.models import sinusoid_mlp
from fastmaml.tasks import FewShotImages, Sinusoid
from fastmaml.tasks.device import DeviceStream
from fastmaml.train import DivergenceError, fit, load_checkpoint
from fastmaml.train.captured import CapturedStep
from fastmaml.train.logging import read_metrics
from fastmaml.train.watch import LossWatch

ENGINES = backends.usable(["cpu_lockstep", "cuda_emulated", "cuda"])
GPUS = backends.usable(["cuda_emulated", "cuda"])
OPTIMIZERS = {
    "adam": lambda p: optim.Adam(p, 1e-2),
    "sgd": lambda p: optim.SGD(p, 1e-2, momentum=0.9),
    "dampened": lambda p: optim.SGD(p, 1e-2, momentum=0.9, dampening=0.5),
}
MODELS = {
    "waves": lambda: sinusoid_mlp(hidden=(8,)),
    "images": lambda: torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4, track_running_stats=False),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 3),
    ),
}


def parts(engine, model="waves", optimizer="adam", seed=0):
    """Learner, tasks and optimizer on a backend, that draws if it can."""
    torch.manual_seed(seed)
    device = backends.device_of(engine)
    net = MODELS[model]().to(device)
    learner = MAML(
        net,
        loss="mse" if model == "waves" else "cross_entropy",
        inner_lr=0.05,
        inner_steps=2,
        batch_norm=None if model == "waves" else "batch",
        engine="native" if engine in ("cuda", "cpu") else engine,
    )
    with kernels_of(engine if engine.startswith("cuda") else "cpu"):
        if model == "waves":
            tasks = Sinusoid(5, 4, seed=seed, device=device)
        else:
            images = torch.arange(5 * 4 * 25).reshape(5, 4, 1, 5, 5) % 256
            images = images.to(torch.uint8)
            tasks = FewShotImages(images, ways=3, rotations=(0, 90), device=device)
    chosen = OPTIMIZERS[optimizer](learner.parameters())
    chosen._backend = engine if engine in ("cpu_lockstep", "cuda_emulated") else None
    return learner, tasks, chosen


def run(made, iterations, **options):
    learner, tasks, optimizer = made
    defaults = {"meta_batch": 3, "progress": False, "tensorboard": False}
    defaults |= {"log_every": 4, "iterations": iterations}
    return fit(learner, tasks, optimizer, **{**defaults, **options})


def by_hand(made, iterations, clip=None, schedule=None):
    """The losses of the same training without `fit`."""
    learner, tasks, optimizer = made
    losses = []
    for _ in range(iterations):
        losses.append(learner.backward(tasks.sample(3), accumulate=False).item())
        if clip is not None:
            torch.nn.utils.clip_grad_value_(list(learner.parameters()), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return losses


def values(made):
    return [p.detach().cpu().clone() for p in made[0].parameters()]


def same(got, want):
    for g, w in zip(values(got), values(want), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_fit_does_what_its_parts_do(engine, model, optimizer):
    got, want = (parts(engine, model, optimizer) for _ in range(2))
    result = run(got, 10, clip_gradient=0.3)
    losses = by_hand(want, 10, clip=0.3)
    same(got, want)
    assert got[1].state_dict() == want[1].state_dict()
    rows = [row["loss"] for row in result.history]
    means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 4), (4, 8), (8, 10))]
    assert rows == pytest.approx(means, rel=1e-6)
    assert ("accuracy" in result.history[0]) == (model == "images")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_step_says_what_it_captures(engine, capsys):
    made = parts(engine)
    result = run(made, 2, progress=True)
    draws = isinstance(made[1]._stream, DeviceStream)
    assert draws == engine.startswith("cuda")
    ending = {
        True: "Sinusoid, meta-gradient and Adam",
        False: "meta-gradient and Adam; Sinusoid draws outside of it",
    }[draws]
    begin = "a CUDA graph of " if engine == "cuda" else "kernel by kernel, as there"
    assert result.how.startswith(begin) and result.how.endswith(ending)
    assert f"meta-steps: {result.how}" in capsys.readouterr().err
    assert run(parts("cpu"), 2).how == "one after the other, each loss read"


@pytest.mark.parametrize("engine", ENGINES)
def test_what_can_not_be_captured_runs_and_is_said(engine):
    def torchs(made):
        optimizer = torch.optim.Adam(made[0].parameters(), 1e-2)
        return (*made[:2], optimizer), "the optimizer is torch.optim.adam.Adam, not"

    def hooked(made):
        made[2].register_step_post_hook(lambda *_: calls.append(1))
        return made, "the optimizer has hooks"

    def watched(made):
        parameter = next(made[0].parameters())
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(1))
        return made, "a parameter has hooks"

    for change in (torchs, hooked, watched):
        calls: list[int] = []
        (got, reason), (want, _) = change(parts(engine)), change(parts(engine))
        result = run(got, 5)
        assert result.how.startswith(f"kernel by kernel: {reason}")
        assert len(calls) == (0 if change is torchs else 5)
        by_hand(want, 5)
        same(got, want)


@pytest.mark.parametrize("engine", ENGINES)
def test_schedules_of_the_rate_are_captured_others_are_not(engine):
    for kind, how in (
        (lambda o: CosineAnnealingLR(o, 8), "meta-gradient and Adam"),
        (lambda o: OneCycleLR(o, 0.05, total_steps=9), "change from step to step"),
    ):
        got, want = parts(engine), parts(engine)
        schedules = [kind(made[2]) for made in (got, want)]
        result = run(got, 8, schedule=schedules[0], log_every=1)
        assert how in result.how
        by_hand(want, 8, schedule=schedules[1])
        same(got, want)
        assert len({row["learning_rate"] for row in result.history}) > 4
    # and the optimizer's own steps read the rate of its group again
    assert got[2]._rates_there is None


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_ends_in_the_same_bits(engine, model, tmp_path):
    def one(iterations, out, resume=False, seed=0):
        made = parts(engine, model, seed=seed)
        with kernels_of(engine if engine.startswith("cuda") else "cpu"):
            validation = copy.copy(made[1]).fixed(3, seed=9)
        schedule = CosineAnnealingLR(made[2], 20)
        options = {"validation": validation, "validate_every": 5, "schedule": schedule}
        options |= {"run_dir": out, "resume": resume, "checkpoint_every": 3}
        run(made, iterations, **options)
        return made, read_metrics(out)

    straight, rows = one(14, tmp_path / "a")
    one(7, tmp_path / "b")
    resumed, again = one(14, tmp_path / "b", resume=True, seed=5)
    same(resumed, straight)
    drop = ("seconds", "meta_steps_per_second")
    kept, got = (
        [{k: v for k, v in r.items() if k not in drop} for r in side]
        for side in (rows, again)
    )
    # the first part ended at 7 with rows of its own
    ends = [r for r in got if r["iteration"] not in (7, 8)]
    assert ends == [r for r in kept if r["iteration"] not in (7, 8)]
    states = [load_checkpoint(tmp_path / x / "last.pt") for x in "ab"]
    assert states[0].sampler == states[1].sampler
    assert states[0].sampler["task"] == 14 * 3
    for mine, other in zip(
        *(s.optimizer["state"].values() for s in states), strict=True
    ):
        assert all(torch.equal(mine[n].cpu(), other[n].cpu()) for n in mine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_killed_between_rows_writes_the_same_row(engine, tmp_path):
    """The checkpoint at 6 holds what the device had summed up since row 4."""

    def kill(row):
        if row["iteration"] == 8:
            raise RuntimeError("killed")

    options = {"run_dir": tmp_path / "r", "checkpoint_every": 3}
    with pytest.raises(RuntimeError, match="killed"):
        run(parts(engine, "images"), 12, on_log=kill, **options)
    kept = load_checkpoint(tmp_path / "r" / "last.pt")
    assert kept.iteration == 6 and kept.progress["watch"]["count"] == 2
    run(parts(engine, "images"), 12, resume=True, **options)
    want = run(parts(engine, "images"), 12).history
    for got, row in zip(read_metrics(tmp_path / "r"), want, strict=True):
        assert all(got[n] == row[n] for n in ("iteration", "loss", "accuracy"))


@pytest.mark.parametrize("engine", ENGINES)
def test_divergence_is_seen_where_a_row_is_due(engine, tmp_path):
    made = parts(engine)
    made[2].param_groups[0]["lr"] = 1e30
    with pytest.raises(DivergenceError, match="iteration 4: the loss is nan"):
        run(made, 20, run_dir=tmp_path / "r")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_is_read_where_a_row_is_due_and_not_before(engine, monkeypatch):
    read = []
    totals = LossWatch._totals

    def noted(self):
        read.append(self.count)
        return totals(self)

    monkeypatch.setattr(LossWatch, "_totals", noted)
    monkeypatch.setattr(LossWatch, "add", None)
    run(parts(engine), 20, log_every=5)
    assert read == [5] * 4


@pytest.mark.parametrize("engine", GPUS)
def test_other_settings_are_captured_anew(engine, monkeypatch):
    """First order from the sixth step on: the learner's settings may change."""
    got, want = parts(engine), parts(engine)
    settings, captures, capture = got[0].settings, [], CapturedStep._capture

    def noted(self):
        captures.append(self._learner.settings.first_order)
        capture(self)

    def change(row):
        if row["iteration"] == 5:
            got[0].settings = replace(settings, first_order=True)

    monkeypatch.setattr(CapturedStep, "_capture", noted)
    run(got, 9, log_every=5, on_log=change)
    assert captures == [False, True]
    by_hand(want, 5)
    want[0].settings = got[0].settings
    by_hand(want, 4)
    same(got, want)


class Operators(TorchDispatchMode):
    """Notes which operators of torch run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ENGINES)
def test_torch_only_makes_tensors_in_a_call_with_loss_weights(engine):
    """So that it launches nothing: losses without a weight and the mean are ours."""
    device = backends.device_of(engine)
    learner = MAML(
        sinusoid_mlp(hidden=(8,)).to(device),
        loss="mse",
        inner_lr=0.05,
        inner_steps=2,
        loss_weights=(0.25, 0.0, 0.75),
        engine="native" if engine == "cuda" else engine,
    )
    tasks = Sinusoid(5, 4, seed=1).sample(3).to(device=device)
    learner.backward(tasks, accumulate=False)
    with Operators() as seen:
        loss = learner.backward(tasks, accumulate=False)
    assert seen.names and all("aten::empty" in name for name in seen.names)
    losses = learner.last.query_loss
    assert losses[:, 1].isnan().all() and not losses[:, ::2].isnan().any()
    torch.testing.assert_close(loss, (0.25 * losses[:, 0] + 0.75 * losses[:, 2]).mean())
