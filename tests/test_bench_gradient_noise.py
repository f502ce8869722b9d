"""Agreement of inner gradients is measured on batches of the same tasks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gymnasium")
from bench import gradient_noise  # noqa: E402


def test_cosines_are_of_all_parameters_of_a_task() -> None:
    one = {"w": torch.tensor([[[3.0]], [[1.0]]]), "b": torch.tensor([[4.0], [0.0]])}
    other = {"w": torch.tensor([[[4.0]], [[2.0]]]), "b": torch.tensor([[3.0], [0.0]])}
    assert gradient_noise.cosines(one, other).tolist() == pytest.approx([0.96, 1.0])


def test_more_episodes_agree_more(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--experiment navigation --tasks 8 --horizon 20 --episodes 2 200".split()
    gradient_noise.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("navigation, 2 episodes a task: cosine")
    few, many = (float(line.split("cosine ")[1].split(" ±")[0]) for line in lines)
    assert few < many and many > 0.5
    same = gradient_noise.parse(words)
    again = gradient_noise.measure(same, 2)
    assert torch.equal(again, gradient_noise.measure(same, 2))


def test_a_checkpoint_is_the_policy(tmp_path: object) -> None:
    from fastmaml.train.checkpoint import CheckpointError

    words = ["--experiment", "navigation", "--checkpoint", f"{tmp_path}/none.pt"]
    with pytest.raises(CheckpointError, match="no checkpoint"):
        gradient_noise.main(words)
