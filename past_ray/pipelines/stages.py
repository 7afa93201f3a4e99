"""Named, resumable stages of a run directory.

::

    run_dir/
      config.yaml  provenance.json      what was asked, and with what; written first
      stages/<name>.json                a finished stage: its result and its seconds
      work/<name>/                      what a running stage needs to continue
      models/<name>/                    Hugging Face folders      skills/<name>/   skill vectors

A stage runs once. Its record is written last and atomically, so a killed run repeats at most the
stage (for SFT and RL: the steps since the last checkpoint) it was in.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from past_ray.storage import write_json

logger = logging.getLogger(__name__)

StageResult = dict[str, Any]

SCALE_CHOICE = "scale_choice"
"""Name of the stage that chooses the scale of the skill vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One resumable piece of work."""

    name: str
    """Unique in the run; names its record and its folders."""

    work: Callable[[], StageResult]
    """Does it and returns what later stages and the report read."""

    num_steps: int | None = None
    """Steps of the progress bar."""


class RunDirectory:
    """Paths and finished stages of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def model(self, name: str) -> Path:
        """Folder of the model ``name``."""
        return self.root / "models" / name

    def skill(self, name: str) -> Path:
        """Folder of the skill vector ``name``."""
        return self.root / "skills" / name

    def adapters(self, name: str) -> Path:
        """Folder with one PEFT folder per passage."""
        return self.root / "adapters" / name

    def work(self, stage: str) -> Path:
        """Folder in which ``stage`` keeps what it needs to continue."""
        return self.root / "work" / stage

    def tables(self, domain: str) -> Path:
        """Folder with the Parquet tables of ``domain``."""
        return self.root / "data" / domain

    def record(self, stage: str) -> Path:
        """File that says that ``stage`` is finished."""
        return self.root / "stages" / f"{stage}.json"

    def finished(self, stage: str) -> StageResult | None:
        """Result of ``stage``, or None when it has not finished."""
        path = self.record(stage)
        return json.loads(path.read_text())["result"] if path.exists() else None

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of every finished stage, in the order they finished."""
        records = [json.loads(path.read_text()) for path in (self.root / "stages").glob("*.json")]
        return {r["stage"]: r["seconds"] for r in sorted(records, key=lambda r: r["finished"])}

    def run(self, stage: str, work: Callable[[], StageResult]) -> StageResult:
        """Return the result of ``stage``, computing it unless it has finished before."""
        done = self.finished(stage)
        if done is not None:
            logger.info("stage %s: finished earlier", stage)
            return done
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        write_json(
            self.record(stage),
            {"stage": stage, "seconds": seconds, "finished": time.time(), "result": result},
        )
        logger.info("stage %s: %.1f s", stage, seconds)
        return result
