"""Presets hold the paper's settings, and experiments build what they say."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmaml import cli
from fastmaml.models import batch_norm_parameters
from fastmaml.recipes import names, recipe
from fastmaml.recipes.common import UserError, load_experiment, save_settings
from fastmaml.recipes.evaluation import format_table

PAPER = [
    ("sinusoid", "paper", {}, dict(inner_lr=0.01, meta_batch=25, iterations=70_000)),
    ("sinusoid", "code", {}, dict(inner_lr=0.001, inner_steps=1, test_steps=10)),
    ("omniglot", "paper", {}, dict(inner_lr=0.4, inner_steps=1, test_steps=3)),
    ("omniglot", "paper", {}, dict(meta_batch=32, iterations=60_000, queries=1)),
    ("omniglot", "paper", {"shots": 5}, dict(queries=5, test_queries=5, inner_lr=0.4)),
    ("omniglot", "paper", {"ways": 20}, dict(inner_lr=0.1, inner_steps=5)),
    ("omniglot", "paper", {"ways": 20}, dict(meta_batch=16, test_steps=5)),
    ("omniglot", "code", {}, dict(test_steps=10)),
    ("mini-imagenet", "paper", {}, dict(inner_lr=0.01, inner_steps=5, test_steps=10)),
    ("mini-imagenet", "paper", {}, dict(meta_batch=4, queries=15, test_queries=1)),
    ("mini-imagenet", "paper", {}, dict(clip_gradient=10.0, channels=32)),
    ("mini-imagenet", "paper", {"shots": 5}, dict(meta_batch=2, test_queries=5)),
    ("mini-imagenet", "code", {"shots": 5}, dict(meta_batch=4, queries=15)),
]


@pytest.mark.parametrize(("name", "preset", "selected", "expected"), PAPER)
def test_presets_hold_the_papers_settings(
    name: str, preset: Any, selected: dict[str, int], expected: dict[str, Any]
) -> None:
    settings = recipe(name).from_preset(preset, **selected)
    assert settings.preset == preset and settings.meta_lr == 1e-3
    found = {key: getattr(settings, key) for key in expected}
    assert found == expected


def _parsed(name: str, *words: str) -> Any:
    kind = recipe(name)
    return cli._parse(kind, list(words), "", cli._defaults(kind, list(words)))


def test_options_override_the_preset_wherever_they_stand() -> None:
    settings = _parsed("sinusoid", "--inner-lr", "0.5", "--preset", "code")
    assert (settings.preset, settings.inner_lr) == ("code", 0.5)
    assert _parsed("sinusoid", "--preset=code").inner_lr == 0.001
    settings = _parsed("omniglot", "--ways", "20", "--inner-steps", "3")
    assert (settings.inner_lr, settings.inner_steps) == (0.1, 3)
    assert _parsed("mini-imagenet", "--shots=5", "--preset", "code").meta_batch == 4


def test_every_setting_has_a_meaning_of_one_line() -> None:
    for name in names():
        kind = recipe(name)
        mine = [c for c in kind.__mro__ if c.__module__.startswith("fastmaml")]
        source = "\n".join(inspect.getsource(c) for c in mine)
        for field in dataclasses.fields(kind):
            pattern = rf'\n    {field.name}: [^\n]+\n    """[^"\n]+"""\n'
            assert re.search(pattern, source), f"{name}: {field.name}"


def test_settings_survive_the_disk(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        recipe("sinusoid").from_preset("code"), test_shots=(1, 2), seed=3
    )
    save_settings(settings, tmp_path)
    loaded = load_experiment(tmp_path)
    assert loaded == dataclasses.replace(settings, out=str(tmp_path))


def test_damaged_settings_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        load_experiment(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        load_experiment(tmp_path)
    (tmp_path / "settings.json").write_text(
        '{"experiment": "sinusoid", "settings": {"speed": 9}}'
    )
    with pytest.raises(UserError, match="unknown settings: speed"):
        load_experiment(tmp_path)


def _glyphs(**changes: Any) -> Any:
    settings = recipe("glyphs").from_preset("paper")
    return dataclasses.replace(settings, characters=48, channels=4, **changes)


def test_batch_norm_is_meta_learned_but_not_adapted() -> None:
    learner = _glyphs().build()
    fixed = batch_norm_parameters(learner.model)
    assert fixed
    batch = _glyphs().make_tasks().fixed(2)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    for name, parameter in learner.model.named_parameters():
        moved = not torch.equal(adapted[name][0], parameter)
        assert moved == (name not in fixed), name
    learner = _glyphs(adapt_batch_norm=True).build()
    adapted = learner.adapt(batch.support_x, batch.support_y)
    parameters = dict(learner.model.named_parameters())
    assert all(not torch.equal(adapted[n][0], parameters[n]) for n in fixed)


def test_the_loss_is_the_sum_over_ways() -> None:
    batch = _glyphs().make_tasks().fixed(2)
    options = {"inner_lr": 1e-30, "inner_steps": 1}
    total = _glyphs(**options).build().meta_loss(batch)
    mean = _glyphs(reduction="mean", **options).build().meta_loss(batch)
    assert total.item() == pytest.approx(5 * mean.item(), rel=1e-5)


def test_a_seed_decides_the_parameters_and_the_tasks() -> None:
    def parts(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        settings = _glyphs(seed=seed)
        first = next(settings.build().parameters()).detach()
        return first, settings.make_tasks(seed=seed).sample(2).query_x

    for a, b, c in zip(parts(1), parts(1), parts(2), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_validation_tasks_are_fixed_and_not_those_of_the_test() -> None:
    settings = recipe("sinusoid").from_preset("paper")
    a, b = settings.validation(), settings.validation()
    assert torch.equal(a.query_x, b.query_x)
    test = settings.make_tasks("test").fixed(len(a))
    assert not torch.equal(a.query_x, test.query_x)
    images = {s: _glyphs().images(s) for s in ("train", "val", "test")}
    assert sum(len(x) for x in images.values()) == 48


@pytest.mark.parametrize("network", ["conv", "fc"])
def test_omniglot_on_real_images(data_dir: Path, network: str) -> None:
    settings = dataclasses.replace(
        recipe("omniglot").from_preset("paper"),
        data=str(data_dir / "omniglot"),
        split="vinyals",
        network=network,
        channels=8,
    )
    learner, tasks = settings.build(), settings.make_tasks("val")
    loss = learner.meta_loss(tasks.sample(2))
    loss.backward()
    assert tasks.input_shape == (1, 28, 28) and torch.isfinite(loss)
    assert len(tasks.rotations) == 4


def test_mini_imagenet_on_real_images(data_dir: Path) -> None:
    settings = dataclasses.replace(
        recipe("mini-imagenet").from_preset("paper"),
        data=str(data_dir / "mini_imagenet"),
        channels=4,
        inner_steps=1,
    )
    tasks = settings.make_tasks("val", queries=1)
    loss = settings.build().meta_loss(tasks.sample(1))
    assert tasks.input_shape == (3, 84, 84) and torch.isfinite(loss)


@pytest.mark.parametrize(
    ("name", "changes", "paper"),
    [
        ("omniglot", {}, "98.7 ± 0.4"),
        ("omniglot", {"ways": 20, "shots": 5}, "98.9 ± 0.2"),
        ("omniglot", {"network": "fc"}, "89.7 ± 1.1"),
        ("mini-imagenet", {}, "48.70 ± 1.84"),
        ("mini-imagenet", {"first_order": True, "shots": 5}, "63.15 ± 0.91"),
        ("omniglot", {"ways": 7}, None),
    ],
)
def test_tables_show_the_papers_row_that_fits(
    name: str, changes: dict[str, Any], paper: str | None
) -> None:
    settings = dataclasses.replace(recipe(name).from_preset("paper"), **changes)
    row = {"ways": settings.ways, "shots": settings.shots, "tasks": 600}
    row |= {"queries": settings.ways, "subset": "test", "transductive": True}
    row |= {"accuracy": [0.2, 0.95], "accuracy_interval": [0.01, 0.004]}
    row |= {"loss": [1.6, 0.2]}
    record = {"checkpoint": "best.pt", "iteration": 60_000, "rows": [row]}
    table = format_table(settings, record)
    assert "95.00 ± 0.40" in table and "1 query per class" in table
    assert (paper in table) if paper else ("paper" not in table)
