"""What a run tells: JSON lines, TensorBoard, and a progress bar or plain lines.

``metrics.jsonl`` is the record: one JSON object a line, flushed as it is written.
Rows of kind ``train`` hold means over the iterations since the row before; rows of
kind ``validation`` hold the metrics after 0..K inner steps on the fixed tasks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

METRICS = "metrics.jsonl"
TIMING_FIELDS = (
    "seconds",
    "meta_steps_per_second",
    "sampling_seconds",
    "processing_seconds",
    "update_seconds",
)


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a run's ``metrics.jsonl``; a half-written last line is left out."""
    path = Path(run_dir) / METRICS
    if not path.is_file():
        return []
    return [row for row, _ in _rows(path)]


def _rows(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Whole rows with the byte position each ends at."""
    rows, end = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        end += len(line)
        if not line.endswith(b"\n"):
            break
        try:
            rows.append((json.loads(line), end))
        except json.JSONDecodeError:
            break
    return rows


class MetricsLog:
    """Writes the rows of a run to its folder and to TensorBoard.

    Args:
        run_dir: the run's folder; ``None`` keeps rows in memory alone.
        iteration: where the run goes on; later rows, written after the checkpoint
            it goes on from, are dropped, for they will be written again.
        tensorboard: write event files; ``None`` does where TensorBoard is installed.

    Attributes:
        rows: rows of this run, those read back on resuming included.

    Raises:
        ValueError: TensorBoard was asked for and is not installed.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None,
        *,
        iteration: int = 0,
        tensorboard: bool | None = None,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._board: Any = None
        if run_dir is None:
            return
        path = Path(run_dir) / METRICS
        self.rows = _truncate(path, iteration)
        self._file = path.open("a", encoding="utf-8")
        self._board = _summary_writer(Path(run_dir), iteration, tensorboard)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row; the file has it when this returns."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            self._write_board(row)

    def sync(self) -> None:
        """Forces the rows to the disk, before a checkpoint counts on them."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def _write_board(self, row: dict[str, Any]) -> None:
        kind, iteration = row["kind"], row["iteration"]
        for name, value in row.items():
            if name in ("kind", "iteration", "seconds") or value is None:
                continue
            if isinstance(value, list):
                for step, item in enumerate(value):
                    if item is None:
                        continue
                    tag = f"{kind}/{name}_after_{step}_steps"
                    self._board.add_scalar(tag, item, iteration)
            else:
                self._board.add_scalar(f"{kind}/{name}", value, iteration)


def _truncate(path: Path, iteration: int) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    kept = [(row, end) for row, end in _rows(path) if row["iteration"] <= iteration]
    os.truncate(path, kept[-1][1] if kept else 0)
    return [row for row, _ in kept]


def _summary_writer(run_dir: Path, iteration: int, wanted: bool | None) -> Any:
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if wanted is None:
            return None
        raise ValueError(
            "tensorboard=True needs TensorBoard, which is not installed: "
            "pip install tensorboard, or leave it out with tensorboard=False"
        ) from error
    purge = iteration + 1 if iteration else None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)


class Progress:
    """A progress bar in a terminal, plain lines elsewhere, both paced by time.

    Args:
        total: iterations of the whole run.
        start: iterations done before.
        enabled: ``False`` shows nothing.
        stream: where to write; standard error unless told.
        line_seconds: seconds between plain lines.

    Attributes:
        due: ``time.perf_counter()`` at which :meth:`show` should next be called; the
            loop compares against it, which costs less than a call.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        line_seconds: float = 5.0,
    ) -> None:
        self.stream = stream or sys.stderr
        self.total, self.start = total, start
        self.due = float("inf")
        self._pause = line_seconds
        self._bar: Any = None
        self._began = time.perf_counter()
        if not enabled:
            return
        self.due = self._began
        if self.stream.isatty():
            from tqdm import tqdm

            self._pause = 0.1
            self._bar = tqdm(
                total=total,
                initial=start,
                unit=" meta-steps",
                file=self.stream,
                mininterval=0.0,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def show(self, iteration: int, loss: float, accuracy: float | None) -> None:
        """Shows the state after ``iteration`` and sets when to show the next."""
        figures = f"loss {loss:.4g}"
        if accuracy is not None:
            figures += f", accuracy {accuracy:.1%}"
        self.tell(iteration, figures)

    def tell(self, iteration: int, figures: str) -> None:
        """As :meth:`show`, with the state in words."""
        if self.due == float("inf"):
            return
        now = time.perf_counter()
        self.due = now + self._pause
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(iteration - self._bar.n)
            return
        speed = (iteration - self.start) / max(now - self._began, 1e-9)
        left = (self.total - iteration) / speed if speed else 0.0
        self.say(
            f"iteration {iteration:,}/{self.total:,}: {figures}, "
            f"{speed:,.1f} meta-steps/s, {clock(left)} left"
        )

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        elif self.due != float("inf"):
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Takes the bar off, leaving its last state."""
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
