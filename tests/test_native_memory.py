"""Workspaces are as planned, and what lies in or around them doesn't matter."""

from __future__ import annotations

import copy
import dataclasses
import mmap
import re
from pathlib import Path

import pytest
import torch
from native_cases import (
    DTYPES,
    Case,
    Forgetful,
    Guards,
    Watched,
    assert_same_bits,
    case,
    embedded_case,
    everything,
    native,
    threads,
)

from fastmaml import _native
from fastmaml.engines.native import NativeEngine
from fastmaml.tasks import TaskBatch

CACHE_LINE = 64  # elements: parameter tensors start on multiples of it
KEPT = 512 << 20

NAMES = [
    "sinusoid",
    "omniglot-conv",
    "omniglot-fc",
    "policy",
    "conv-17to33-k3x3-s2x1-p1x2",
    "conv-first-3to5-k3x3-s1x1-p1x1",
    "conv-64to65-k3x3-s1x1-p1x1",
    "conv-16to33-k3x3-s1x1-p0x0-no-bias",
    "batch-norm-space",
    "layer-norm-space",
    "max-pool-3-s2-p1-overlap",
    "batch-norm-pool-2x2-of-17",
    "batch-norm-pool-3x3-of-5",
    "conv-norm-pool-3x3-of-3to16",
    "conv-norm-pool-3x3-of-1to5",
    "conv-norm-pool-3x3-of-3to32",
    "avg-pool-2-s2-remainder",
    "global-pool-9",
    "cross-entropy-17-n7-sum_over_ways",
    "append-parameter-inside",
]
every_name = pytest.mark.parametrize("name", NAMES)
both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)


def meta(engine: NativeEngine, c: Case, steps: int, **options) -> dict:
    got = engine.meta_gradient(c.params, c.rates, c.tasks, steps=steps, **options)
    return got.gradients


# -- the plan --------------------------------------------------------------------------


@every_name
def test_kept_and_recomputed_activations_give_the_same_bits(name):
    c = case(name)
    keep, recompute = native(c, memory="keep"), native(c, memory="recompute")
    assert_same_bits(everything(recompute, c, steps=3), everything(keep, c, steps=3))
    meta(keep, c, 3), meta(recompute, c, 3)
    assert keep.plan.kept and not recompute.plan.kept
    assert keep.plan.slot - recompute.plan.slot == 2 * recompute.plan.tape


@every_name
def test_a_step_more_takes_one_copy_of_the_parameters(name):
    c = case(name)
    engine = native(c, memory="recompute")
    plans = []
    for steps in (1, 2, 3, 10):
        meta(engine, c, steps)
        plans.append(engine.plan)
    copy = plans[1].slot - plans[0].slot
    assert [p.slot - plans[0].slot for p in plans] == [0, copy, 2 * copy, 9 * copy]
    assert len({p.shared for p in plans}) == 1
    assert len({p.tape for p in plans}) == 1
    exact = 8 * sum(p.numel() for p in c.params.values())
    assert exact <= copy <= exact + 8 * CACHE_LINE * len(c.params)


@every_name
def test_a_step_more_that_is_kept_takes_its_activations_too(name):
    c = case(name)
    keep, recompute = native(c, memory="keep"), native(c, memory="recompute")
    slots = []
    for engine in (keep, recompute):
        for steps in (2, 3):
            meta(engine, c, steps)
            slots.append(engine.plan.slot)
    assert (slots[1] - slots[0]) - (slots[3] - slots[2]) == keep.plan.tape > 0


def test_gradients_of_rates_take_one_more_copy_a_step():
    c = case("linear-9to15")
    engine = native(c, memory="recompute")
    slots = {}
    for wanted in (False, True):
        for steps in (1, 2):
            meta(engine, c, steps, rate_gradient=wanted)
            slots[wanted, steps] = engine.plan.slot
    more, plain = (slots[w, 2] - slots[w, 1] for w in (True, False))
    assert more == 2 * plain


def test_float32_takes_half():
    c = case("omniglot-conv")
    engine = native(c)
    plans = []
    for dtype in DTYPES:
        params = {n: p.to(dtype) for n, p in c.params.items()}
        engine.meta_gradient(params, c.rates, c.tasks.to(dtype=dtype), steps=2)
        plans.append(engine.plan)
    assert plans[0].total == 2 * plans[1].total
    assert plans[0].tape == 2 * plans[1].tape


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_slot_per_task_in_work(count):
    c = case("linear-9to15", tasks=2)
    engine = native(c)
    with threads(count):
        meta(engine, c, 2)
    plan = engine.plan
    assert plan.slots == min(count, 2)
    assert plan.total == plan.shared + plan.slots * plan.slot
    assert engine._workspace.numel() == plan.total


def flags_of_mapping(address: int) -> list[str]:
    """The kernel's flags of the memory around an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(end, 16) for end in found.groups())
            inside = first <= address < last
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise ValueError(f"{address:#x} is not mapped")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists()
    or not Path("/proc/self/smaps").exists(),
    reason="this kernel has no transparent huge pages",
)
def test_large_workspaces_ask_for_huge_pages():
    size = 64 << 20
    space = native(case("omniglot-conv"))._larger(size)
    assert "hg" in flags_of_mapping(space.data_ptr() + size // 2)


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="this system has no smaps"
)
def test_little_memory_asks_for_no_huge_pages():
    """Of its own mapping: what a heap hands out may have asked before."""
    size = 1 << 20
    mapping = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    _native.core().wish_for_huge_pages(mapping.data_ptr(), size)
    assert "hg" not in flags_of_mapping(mapping.data_ptr() + size // 2)


def without_workspace(arguments: tuple) -> tuple:
    """A call that has no workspace answers with its plan and runs nothing."""
    return *arguments[:-1], (0, 0)


def test_auto_keeps_up_to_its_limit():
    c = case("omniglot-conv")
    engine = native(c)
    engine._core = Watched(without_workspace)

    def plan(steps: int, **options):
        meta(engine, c, steps, **options)
        return engine._core.answers[-1]

    two = plan(2)
    most = KEPT // (two.slots * two.tape_bytes)
    assert plan(most).kept and not plan(most + 1).kept
    assert not plan(most, first_order=True).kept


@pytest.mark.parametrize("short", [1, 64])
def test_a_workspace_too_small_is_not_touched(short):
    c = case("linear-9to15")
    engine = native(c)
    meta(engine, c, 2)
    total = engine.plan.total
    space = torch.full((total - short,), 7, dtype=torch.uint8)
    small = space.data_ptr(), space.numel()
    engine._core = Watched(lambda arguments: (*arguments[:-1], small))
    meta(engine, c, 2)
    assert engine._core.answers[-1].bytes == total
    assert (space == 7).all()


# -- what lies in memory beforehand ----------------------------------------------------


@both_dtypes
@every_name
def test_workspaces_full_of_nan_change_nothing(name, dtype):
    c = case(name)
    engine = native(c)
    want = everything(engine, c, dtype)

    def fill(arguments: tuple) -> tuple:
        engine._workspace.fill_(255)
        return arguments

    engine._core = Watched(fill)
    assert_same_bits(everything(engine, c, dtype), want)
    sizes = [plan.bytes for plan in engine._core.answers]
    assert len(sizes) == 7 and 0 < max(sizes) <= engine._workspace.numel()


@pytest.mark.parametrize("count", [1, 2, 3])
@both_dtypes
@every_name
def test_nothing_is_written_or_read_outside(name, dtype, count, monkeypatch):
    """Workspace and outputs between guards, inputs among NaN, all of exact size."""
    c = case(name)
    guards, inside = Guards(), embedded_case(c)
    engines = [native(c, Forgetful, memory=m) for m in ("keep", "recompute")]
    with threads(count):
        want = everything(native(c), c, dtype)
        monkeypatch.setattr(torch, "empty", guards.empty)
        results = [everything(engine, inside, dtype) for engine in engines]
        monkeypatch.undo()
    guards.check()
    assert engines[1].plan.total in guards.sizes()
    for got in results:
        assert_same_bits(got, want)


@both_dtypes
@every_name
def test_inputs_are_not_modified(name, dtype):
    c = case(name)
    inside = embedded_case(c)
    tensors = [
        *inside.params.values(),
        *inside.own.values(),
        *inside.vector.values(),
        inside.tasks.support_x,
        inside.tasks.query_x,
        inside.rates.values,
    ]
    before = [memory_of(t).clone() for t in tensors]
    everything(native(c), inside, dtype)
    assert all(map(torch.equal, map(memory_of, tensors), before))


def memory_of(t: torch.Tensor) -> torch.Tensor:
    """All bytes of the tensor's storage, those around it included."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


# -- how inputs lie in memory ----------------------------------------------------------


def relaid(c: Case, change) -> Case:
    """A case with its samples laid out anew by ``change``."""
    t = c.tasks
    fields = t.support_x, t.support_y, t.query_x, t.query_y
    return dataclasses.replace(c, tasks=TaskBatch(*(change(f) for f in fields)))


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.movedim(2, -1).contiguous().movedim(-1, 2) if t.dim() == 5 else t


def samples_first(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def strided(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


@both_dtypes
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mini-imagenet-conv", channels_last),
        ("conv-first-3to5-k3x3-s1x1-p1x1", channels_last),
        ("conv-first-3to5-k3x3-s1x1-p1x1", samples_first),
        ("conv-first-3to5-k3x3-s1x1-p1x1", strided),
        ("flatten-input", channels_last),
        ("linear-9to15", samples_first),
        ("linear-9to15", strided),
    ],
)
def test_layout_of_the_samples_changes_no_bit(name, change, dtype):
    c = case(name)
    other = relaid(c, change)
    assert torch.equal(other.tasks.support_x, c.tasks.support_x)
    assert not other.tasks.support_x.is_contiguous()
    engine = native(c)
    want = everything(engine, c, dtype, steps=1)
    assert_same_bits(everything(engine, other, dtype, steps=1), want)


def test_layout_of_the_parameters_changes_no_bit():
    c = case("conv-3to5-k3x3-s1x1-p1x1")
    model = copy.deepcopy(c.model).to(memory_format=torch.channels_last)
    params = {n: p.detach() for n, p in model.named_parameters()}
    assert not all(p.is_contiguous() for p in params.values())
    own = {n: samples_first(p) for n, p in c.own.items()}
    other = dataclasses.replace(c, params=params, own=own)
    assert_same_bits(everything(native(c), other), everything(native(c), c))


@pytest.mark.parametrize("half", ["support_x", "query_x"])
def test_one_half_alone_may_be_channels_last(half):
    c = case("conv-first-3to5-k3x3-s1x1-p1x1")
    changed = {half: channels_last(getattr(c.tasks, half))}
    other = dataclasses.replace(c, tasks=dataclasses.replace(c.tasks, **changed))
    assert_same_bits(everything(native(c), other), everything(native(c), c))


def test_slices_of_a_batch_are_read_where_they_lie():
    c = case("conv-first-3to5-k3x3-s1x1-p1x1", tasks=4)
    whole = native(c).forward(c.params, c.tasks.support_x)
    some = native(c).forward(c.params, c.tasks[1:3].support_x)
    assert torch.equal(some, whole[1:3])


def test_parameters_that_require_gradients_are_read_without_a_graph():
    c = case("linear-9to15")
    params = dict(c.model.named_parameters())
    assert all(p.requires_grad for p in params.values())
    got = native(c).meta_gradient(params, c.rates, c.tasks, steps=1)
    assert not got.loss.requires_grad
    assert_same_bits(got.gradients, meta(native(c), c, 1))
