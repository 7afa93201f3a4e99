"""What the user sees while a run works: stage, step, reward, tokens/s and time left."""

import logging
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
"""Without a terminal a line is logged this often instead of a moving bar."""

SHOWN = {
    "reward": "reward {:.2f}",
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "tokens_per_s": "{:,.0f} tok/s",
}
"""Metrics that are shown, in this order."""


class ProgressDisplay:
    """A bar for the stages and one for the steps of the current stage."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}", justify="right"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._stages = self._bars.add_task("stages", total=None, metrics="")
        self._num_stages = 0
        self._stage_index = 0
        self._stage_name = ""
        self._steps: TaskID | None = None
        self._last_log = 0.0

    def __enter__(self) -> "ProgressDisplay":
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the screen."""
        self._bars.stop()

    def expect(self, num_stages: int) -> None:
        """Say how many stages there will be."""
        self._num_stages = num_stages
        self._bars.update(self._stages, total=num_stages)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Generator[None]:
        """Show the stage ``name`` with ``total`` steps while the block runs."""
        self._stage_index += 1
        self._stage_name, self._last_log = name, 0.0
        self._steps = self._bars.add_task(name, total=total, metrics="")
        try:
            yield
        finally:
            self._bars.remove_task(self._steps)
            self._bars.advance(self._stages)
            self._steps = None

    def step(self, completed: int, metrics: Mapping[str, float]) -> None:
        """Show that ``completed`` steps of the current stage are done."""
        text = "  ".join(form.format(metrics[key]) for key, form in SHOWN.items() if key in metrics)
        if self._steps is not None:
            self._bars.update(self._steps, completed=completed, metrics=text)
        if self._bars.disable and time.monotonic() - self._last_log >= LOG_EVERY_S:
            self._last_log = time.monotonic()
            where = f"{self._stage_index}/{self._num_stages} {self._stage_name}"
            logger.info("stage %s: step %d  %s", where, completed, text)
