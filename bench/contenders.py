"""Everything that takes part: fastmaml and its peers behind one interface.

A contender computes one meta-gradient (loss and gradients of all parameters, averaged
over tasks) or one meta-step (that, and Adam). Each gets its inputs in its own arrays
before the clock runs; fastmaml also takes whole training steps, which draw their tasks
first. Adam is everyone's fastest: fastmaml's own, torch's fused, JAX's inside the step.
Its rate is tiny, so thousands of timed steps stay where they are and every contender
works on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bench import cost, peers, peers_jax, timing
from bench.workloads import Workload
from fastmaml import MAML, _native
from fastmaml.models import batch_norm_parameters
from fastmaml.optim import Adam
from fastmaml.tasks.batch import TaskBatch
from fastmaml.train.captured import CapturedStep

OUTER_RATE = 1e-8
OURS = "fastmaml"
BACKENDS = ("cpu_lockstep", "cuda_emulated")  # engines that run CPU tensors as a GPU
Engine = Literal["native", "functional", "cpu_lockstep", "cuda_emulated"]
LONG_COMPILES = ("omniglot-conv-5", "mini-imagenet")


@dataclass(frozen=True)
class Contender:
    """One implementation of one workload.

    Attributes:
        name: as in the table.
        prepare: turns a meta-batch into what the two functions below take.
        meta_gradient: returns (loss, gradients).
        meta_step: changes the contender's own parameters.
        gradients: turns ``meta_gradient``'s second result into torch tensors.
        training_step: draws tasks and takes a meta-step on them; ``None`` for peers,
            and where a workload's tasks come from elsewhere.
        captured_step: ``meta_step`` as a CUDA graph, made from a meta-batch; ``None``
            for peers, and where calls return when they are done.
        finish: waits for a call's result; ``None`` where it is there on return.
    """

    name: str
    prepare: Callable[[TaskBatch], Any]
    meta_gradient: Callable[[Any], tuple[Any, Any]]
    meta_step: Callable[[Any], object]
    gradients: Callable[[Any], dict[str, Tensor]]
    training_step: Callable[[], object] | None = None
    captured_step: Callable[[TaskBatch], Callable[[TaskBatch], object]] | None = None
    finish: timing.Finish | None = None


def make_learner(
    workload: Workload, engine: Engine, model: nn.Module, memory: Any = "auto"
) -> MAML:
    """Makes fastmaml's learner for a workload."""
    kept = batch_norm_parameters(model)
    return MAML(
        model,
        loss=workload.loss,
        inner_lr=workload.inner_lr,
        inner_steps=workload.steps,
        adapted=lambda name: name not in kept,
        engine=engine,
        memory=memory,
    )


def ours(
    workload: Workload, engine: Engine = "native", device: str = "cpu"
) -> Contender:
    """Makes fastmaml's contender, as a user's training loop has it.

    What a loop calls stands in the first three functions alone, bookkeeping included:
    the gradient into ``.grad``, the outer optimizer, the sampler.
    """
    model = workload.model().to(device)
    learner = make_learner(workload, engine, model)
    optimizer = Adam(model.parameters(), lr=OUTER_RATE)
    if engine in BACKENDS:
        optimizer._backend = engine
    sampler = (
        None
        if workload.source is None or device != "cpu"
        else workload.source(workload.support, workload.query)
    )

    named = dict(model.named_parameters())

    def backward(tasks: TaskBatch) -> Tensor:
        return learner.backward(tasks, accumulate=False)

    def meta_step(tasks: TaskBatch) -> None:
        backward(tasks)
        optimizer.step()

    def training_step() -> None:
        assert sampler is not None
        meta_step(sampler.sample(workload.tasks))

    def captured_step(tasks: TaskBatch) -> CapturedStep:
        own = workload.model().to(device)  # what a graph writes is its alone
        adam = Adam(own.parameters(), lr=OUTER_RATE)
        adam._backend = optimizer._backend
        return CapturedStep(make_learner(workload, engine, own), adam, tasks)

    def meta_gradient(tasks: TaskBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
        loss = backward(tasks)
        return loss, {n: p.grad for n, p in named.items()}

    return Contender(
        OURS if engine == "native" else f"{OURS} ({engine} engine)",
        lambda tasks: tasks.to(device=device),
        meta_gradient,
        meta_step,
        dict,
        None if sampler is None else training_step,
        captured_step if device != "cpu" or engine in BACKENDS else None,
        cost.waits(device),
    )


def torch_peer(workload: Workload, name: str, device: str = "cpu") -> Contender:
    """Makes a contender of one of ``peers.PEERS``."""
    model = workload.model().to(device)
    function = peers.PEERS[name](peers.make_problem(workload, model))
    named = dict(model.named_parameters())
    detached = {n: p.detach() for n, p in named.items()}  # same memory, no graph
    optimizer = torch.optim.Adam(model.parameters(), lr=OUTER_RATE, fused=True)

    def meta_gradient(tasks: TaskBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return function(detached, tasks)

    def meta_step(tasks: TaskBatch) -> None:
        _, gradients = function(detached, tasks)
        for n, p in named.items():
            p.grad = gradients[n]
        optimizer.step()

    return Contender(
        name,
        lambda tasks: tasks.to(device=device),
        meta_gradient,
        meta_step,
        dict,
        finish=cost.waits(device),
    )


def jax_peer(workload: Workload, name: str, device: str = "cpu") -> Contender:
    """Makes a contender of one of ``peers_jax.PEERS``."""
    import jax

    model = workload.model()
    function = peers_jax.PEERS[name](workload, model)
    gradient, step = (
        jax.jit(function),
        jax.jit(peers_jax.adam_step(function, OUTER_RATE)),
    )
    params = peers_jax.to_params(model)
    state = {"params": params, "adam": peers_jax.adam_state(params)}

    def meta_gradient(tasks: Any) -> tuple[Any, Any]:
        return gradient(params, tasks)

    def meta_step(tasks: Any) -> Any:
        moved, adam, loss = step(state["params"], state["adam"], tasks)
        state.update(params=moved, adam=adam)
        return moved, adam, loss

    def gradients(tree: Any) -> dict[str, Tensor]:
        return {n: torch.from_numpy(np.array(g)) for n, g in tree.items()}

    def at_once(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda tasks: jax.block_until_ready(call(tasks))

    if device == "cpu":  # like everyone there: done on return
        meta_gradient, meta_step = at_once(meta_gradient), at_once(meta_step)
    return Contender(
        name,
        peers_jax.to_tasks,
        meta_gradient,
        meta_step,
        gradients,
        finish=None if device == "cpu" else jax.block_until_ready,
    )


def names(
    engines: Sequence[Engine] = ("native",), chosen: Sequence[str] | None = None
) -> list[str]:
    """Returns the names of all contenders, fastmaml's first, or of the chosen peers."""
    mine = [OURS if e == "native" else f"{OURS} ({e} engine)" for e in engines]
    everyone = [*peers.PEERS, *peers_jax.PEERS]
    return mine + [n for n in everyone if chosen is None or n in chosen]


def make(workload: Workload, name: str, device: str = "cpu") -> Contender:
    """Makes a contender by name, with everything it computes on a device.

    Raises:
        ValueError: if there is none of that name.
    """
    if name == OURS:
        return ours(workload, device=device)
    for engine in ("functional", *BACKENDS):
        if name == f"{OURS} ({engine} engine)":
            return ours(workload, engine, device)  # type: ignore[arg-type]
    if name in peers.PEERS:
        return torch_peer(workload, name, device)
    if name in peers_jax.PEERS:
        return jax_peer(workload, name, device)
    raise ValueError(f"contender {name!r}: expected one of {names()}")


def compiles(name: str) -> bool:
    """Whether a contender's first call compiles for long enough to need a limit."""
    return name == "vmap + torch.compile" or name in peers_jax.PEERS


def native_missing() -> str | None:
    """Returns why fastmaml's native engine can't run here, or ``None``."""
    reason = _native.unavailable()
    return None if reason is None else reason.splitlines()[0]


def reason_to_skip(
    workload: Workload, name: str, compile_all: bool, device: str = "cpu"
) -> str | None:
    """Returns why a contender sits a workload out, or ``None`` if it takes part."""
    if name in peers_jax.PEERS:
        return peers_jax.missing(device)
    long = name == "vmap + torch.compile" and workload.name in LONG_COMPILES
    if long and not compile_all:
        return "compiles for minutes; measured with --compile-all"
    return None
