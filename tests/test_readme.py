"""What the README says runs, runs, and means what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastmaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
USE, EQUIVALENT, MIGRATION = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def names() -> dict[str, object]:
    """The README's first example, with 20 iterations for 1000."""
    space: dict[str, object] = {}
    exec(USE.replace("range(1000)", "range(20)"), space)
    return space


def test_the_example_reports_and_evaluates(capsys, names):
    out = capsys.readouterr().out
    assert names["learner"].report.engine == "native"
    assert str(names["learner"].report) in out


def test_the_equivalent_is_equivalent(names):
    model = names["model"].double()
    tasks = names["sampler"].sample(25).to(dtype=torch.float64)
    exec(EQUIVALENT, names)
    params = dict(model.named_parameters())
    expected = names["meta_loss"](params, tasks)
    gradients = torch.autograd.grad(expected, list(params.values()))
    model.zero_grad()
    learner = fastmaml.MAML(model, loss="mse", inner_lr=0.01, inner_steps=1)
    loss = learner.meta_loss(tasks)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(params.values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_both_migrated_loops_give_one_gradient(names):
    model: nn.Module = names["model"]
    one_by_one, batched = MIGRATION.split("# the fast path")
    model.zero_grad()
    exec(one_by_one, names)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    exec("# the fast path" + batched, names)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_every_command_it_names_exists():
    from fastmaml import cli

    shell = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    commands = set(re.findall(r"\bfastmaml (\w+)", shell))
    assert commands >= {"train", "evaluate", "plot", "info"}
    for command in commands:
        assert re.search(rf"\b{command}\b", cli.__doc__ or ""), command


def test_every_knob_it_names_is_read():
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    for folder, ending in (("fastmaml", "*.py"), ("csrc", "*.cpp")):
        sources += (ROOT / folder).rglob(ending)
    code = "\n".join(path.read_text() for path in sources)
    knobs = set(re.findall(r"`(FASTMAML_\w+)`", README))
    assert {"FASTMAML_ISA", "FASTMAML_CUDA_ARCHS", "FASTMAML_CORE_PATH"} <= knobs
    for knob in knobs:
        assert re.search(rf"\b{knob}\b", code), knob
