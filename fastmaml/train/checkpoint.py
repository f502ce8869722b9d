"""Checkpoints: everything a run needs to go on with the same bits.

A checkpoint holds tensors and primitive types alone, so ``torch.load`` reads it with
``weights_only=True`` and never runs code from the file. It is written to a temporary
file, forced to the disk and renamed, so that a file under its final name is whole.
"""

from __future__ import annotations

import os
import pickle
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
BEST, LAST = "best.pt", "last.pt"


class CheckpointError(ValueError):
    """A checkpoint is missing, broken, or of another format."""


@dataclass
class Checkpoint:
    """The state of a run after ``iteration`` meta-steps.

    Attributes:
        iteration: meta-steps done.
        learner: the learner's state: model parameters and learned inner rates.
        optimizer: the outer optimizer's state.
        sampler: the task sampler's state.
        schedule: the learning-rate schedule's state, ``None`` without one.
        random: states of the generators of torch, numpy and Python.
        progress: the loop's own: running sums, seconds, best metric.
        settings: what the run was started with, as plain types.
        format: version of this layout.
    """

    iteration: int
    learner: dict[str, Any]
    optimizer: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] | None = None
    random: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint atomically.

    Args:
        path: the final file; its folder is made.
        checkpoint: what to write.

    Returns:
        The final path. A reader sees the old file or the new one, never a part.

    Raises:
        CheckpointError: a parameter is not finite, so that the checkpoint would be
            of no use; the file under ``path`` stays as it was.
    """
    path = Path(path)
    broken = non_finite(checkpoint.learner)
    if broken:
        raise CheckpointError(
            f"not writing {path}: parameter {broken[0]!r} holds NaN or infinity after "
            f"iteration {checkpoint.iteration}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(_portable(_shallow(checkpoint)), file)
    return path


def load_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> Checkpoint:
    """Reads a checkpoint; no code of the file is run.

    Args:
        path: a file written by :func:`save_checkpoint`.
        device: where tensors go.

    Raises:
        CheckpointError: there is no such file, it is damaged, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: the run has not saved one yet")
    try:
        raw = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} can't be read as a checkpoint: {reason}"
        ) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise CheckpointError(
            f"{path} has checkpoint format {found!r}, expected {FORMAT}: it was "
            "written by another version or another program"
        )
    known = {f.name for f in fields(Checkpoint)}
    return Checkpoint(**{k: v for k, v in _restored(raw).items() if k in known})


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Says that a checkpoint is another run's where it does not fit this one.

    Raises:
        CheckpointError: in place of what a learner or torch finds wrong with it.
    """
    try:
        yield
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        found = " ".join(str(error).split())
        found = found if len(found) < 200 else found[:200] + " ..."
        raise CheckpointError(
            f"{path} does not fit the settings of this run: {found}. Expected a "
            "checkpoint that this run has written; put it back, or start another run"
        ) from error


def checkpoint_path(run_dir: str | os.PathLike[str], checkpoint: str) -> Path:
    """Where ``best`` or ``last`` is; without a best one, the last."""
    path = Path(run_dir) / f"{checkpoint}.pt"
    if checkpoint == "best" and not path.is_file():
        return Path(run_dir) / LAST
    return path


def non_finite(state: dict[str, Any]) -> list[str]:
    """Names of the floating-point tensors of ``state`` that hold NaN or infinity."""
    return [
        name
        for name, value in _tensors(state)
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]


def random_state() -> dict[str, Any]:
    """States of the global generators of torch (CPU and CUDA), numpy and Python."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": list(np.random.get_state(legacy=True)),
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


class atomic_file:  # noqa: N801 - reads as a function in a with statement
    """Opens a temporary file that becomes ``path`` if the block succeeds."""

    def __init__(self, path: Path) -> None:
        """Prepares to write ``path``; its folder must exist."""
        self.path = path

    def __enter__(self) -> Any:
        """Opens the temporary file beside its final place."""
        handle, self._temporary = tempfile.mkstemp(
            prefix=f".{self.path.name}.", dir=self.path.parent
        )
        self._file = os.fdopen(handle, "wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Forces the bytes to the disk and renames, or removes the temporary file."""
        if kind is not None:
            self._file.close()
            os.unlink(self._temporary)
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.chmod(self._temporary, 0o644)
        os.replace(self._temporary, self.path)


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces the text of a file in one step."""
    with atomic_file(path) as file:
        file.write(text.encode())


def _shallow(checkpoint: Checkpoint) -> dict[str, Any]:
    """A dictionary of the fields; ``asdict`` would copy every tensor."""
    return {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}


def _tensors(state: Any, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        return [(name, state)]
    if not isinstance(state, dict):
        return []
    found = []
    for key, value in state.items():
        found += _tensors(value, f"{name}.{key}" if name else str(key))
    return found


def _portable(value: Any) -> Any:
    """Replaces numpy values, which a weights-only load refuses, by torch's."""
    if isinstance(value, np.ndarray):
        return {"__numpy__": torch.from_numpy(value.copy())}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_portable(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise TypeError(
        f"a checkpoint can't hold a {type(value).__name__}: state_dict() and settings "
        "should return tensors, numbers, strings and containers of them"
    )


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__numpy__"}:
            return value["__numpy__"].cpu().numpy()
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_restored(item) for item in value)
    return value


def plain_settings(settings: Any) -> dict[str, Any]:
    """Settings as a dictionary of plain types; takes a dataclass or a mapping."""
    raw = dict(settings) if isinstance(settings, dict) else asdict(settings)
    return {k: str(v) if isinstance(v, Path) else v for k, v in raw.items()}


def open_run(
    run_dir: Path | None,
    resume: bool,
    iterations: int,
    device: torch.device | str = "cpu",
) -> Checkpoint | None:
    """Makes a run's folder, and finds where the run in it has stopped.

    Args:
        run_dir: the folder; ``None`` writes nothing.
        resume: go on with a run that may be there.
        iterations: of the whole run.
        device: where the checkpoint's tensors go.

    Returns:
        The checkpoint to go on from, ``None`` to begin anew.

    Raises:
        CheckpointError: ``last.pt`` can't be read.
        ValueError: there is no folder to resume from, it holds a run though ``resume``
            is false, or that run is past ``iterations``.
    """
    if run_dir is None:
        if resume:
            raise ValueError("resume=True needs the run_dir to go on from")
        return None
    last = run_dir / LAST
    found = None
    if resume and last.is_file():
        found = load_checkpoint(last, device)
        if found.iteration > iterations:
            raise ValueError(
                f"{last} is at iteration {found.iteration}, past iterations="
                f"{iterations}: ask for more, or start another run"
            )
    elif not resume and last.exists():
        raise ValueError(
            f"run_dir {run_dir} already holds a run: pass resume=True to go "
            "on with it, or choose another folder"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    return found
