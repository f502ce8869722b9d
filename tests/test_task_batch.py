"""TaskBatch refuses what does not belong together, and keeps its task axis."""

import dataclasses

import pytest
import torch

from fastmaml.tasks import TaskBatch


def fields(**changes):
    """Fields of a good classification batch: T=3, S=4, Q=2, samples of [5]."""
    good = {
        "support_x": torch.rand(3, 4, 5),
        "support_y": torch.randint(0, 2, (3, 4)),
        "query_x": torch.rand(3, 2, 5),
        "query_y": torch.randint(0, 2, (3, 2)),
    }
    return {**good, **changes}


def test_sizes():
    batch = TaskBatch(**fields())
    sizes = (len(batch), batch.tasks, batch.support_size, batch.query_size)
    assert sizes == (3, 3, 4, 2)


def test_floating_targets_and_token_inputs_are_accepted():
    TaskBatch(**fields(support_y=torch.rand(3, 4, 2), query_y=torch.rand(3, 2, 2)))
    TaskBatch(
        **fields(support_x=torch.ones(3, 4).long(), query_x=torch.ones(3, 2).long())
    )


def test_is_frozen():
    batch = TaskBatch(**fields())
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.support_x = torch.zeros(3, 4, 5)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"support_x": [1.0]}, TypeError, "support_x must be a torch.Tensor, got list"),
        ({"support_x": torch.ones(3, 4, 5).byte()}, TypeError, r"uint8.*/ 255"),
        ({"support_y": torch.ones(3, 4).int()}, TypeError, "support_y.*int32"),
        ({"support_y": torch.rand(3, 4)}, ValueError, "support_y.*outputs"),
        ({"support_y": torch.rand(3, 4, 1)}, TypeError, "query_y is torch.int64"),
        ({"query_x": torch.rand(3, 2, 5).double()}, TypeError, "query_x.*float64"),
        (
            {
                "support_y": torch.rand(3, 4, 1).double(),
                "query_y": torch.rand(3, 2, 1).double(),
            },
            TypeError,
            "support_y is torch.float64 but support_x is torch.float32",
        ),
        ({"support_x": torch.rand(3)}, ValueError, r"support_x must be \[tasks"),
        ({"support_y": torch.ones(3, 5).long()}, ValueError, r"\(3, 4\).*\(3, 5\)"),
        (
            {"query_x": torch.rand(2, 2, 5), "query_y": torch.ones(2, 2).long()},
            ValueError,
            "support_x has 3 tasks, query_x 2",
        ),
        ({"query_x": torch.rand(3, 2, 6)}, ValueError, r"\(5,\).*\(6,\)"),
        (
            {"query_x": torch.rand(3, 0, 5), "query_y": torch.ones(3, 0).long()},
            ValueError,
            "query_x needs at least one",
        ),
        ({"query_y": torch.ones(3, 2, device="meta").long()}, ValueError, "meta"),
        ({"support_x": torch.rand(3, 4, 5, device="meta")}, ValueError, "meta"),
    ],
)
def test_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        TaskBatch(**fields(**changes))


def test_all_on_one_device_means_both_halves():
    names = ("support_x", "query_x")
    moved = {name: fields()[name].to("meta") for name in names}
    with pytest.raises(ValueError, match="support_y is on cpu, support_x on meta"):
        TaskBatch(**fields(**moved))


@pytest.mark.parametrize(
    "index",
    [slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.tensor([False, True, True])],
)
def test_index_chooses_tasks(index):
    batch = TaskBatch(**fields())
    for field in dataclasses.fields(TaskBatch):
        whole, part = getattr(batch, field.name), getattr(batch[index], field.name)
        assert torch.equal(part, whole[1:3])


@pytest.mark.parametrize("index", [0, torch.tensor(1)])
def test_a_single_index_is_refused_with_advice(index):
    with pytest.raises(TypeError, match=r"batch\[i : i \+ 1\]"):
        TaskBatch(**fields())[index]


def test_an_empty_choice_is_refused():
    with pytest.raises(ValueError, match="at least one task"):
        TaskBatch(**fields())[3:]


def test_to_changes_floating_fields_alone():
    batch = TaskBatch(**fields()).to(dtype=torch.float64)
    assert batch.support_x.dtype == batch.query_x.dtype == torch.float64
    assert batch.support_y.dtype == batch.query_y.dtype == torch.int64
    assert batch.to("meta").device.type == "meta"
    with pytest.raises(TypeError, match="floating"):
        batch.to(dtype=torch.int64)


def test_prints_shapes_instead_of_values():
    x, y = torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3).long()
    assert repr(TaskBatch(x, y, x, y)) == (
        "TaskBatch(support_x=(2, 3, 4), support_y=(2, 3), query_x=(2, 3, 4), "
        "query_y=(2, 3), float64, cpu)"
    )
