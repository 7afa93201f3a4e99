"""Trains one step of an RL run again from its stored rollouts, without a generator.

::

    work_dir/rl.json                              start and settings of the run
    work_dir/step-000012/                         newest checkpoint before the step, or the start
    work_dir/rollouts/step=000013/ ... =000015/   groups of the steps from there on
    work_dir/metrics.jsonl                        what the run had logged

Steps in between are trained as the run did; other settings act on the asked step alone. So the
state it starts from is the run's own.
"""

import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from past_ray.config.base import StrictConfig
from past_ray.config.loading import load_config
from past_ray.config.rl import RLConfig
from past_ray.engine.learner import GRPOLearner
from past_ray.engine.learner_checkpoint import verify_checkpoint
from past_ray.errors import ConfigError, StorageError
from past_ray.rl.batching import build_train_samples
from past_ray.rl.metrics import rollout_metrics, staleness_metrics
from past_ray.rl.objective import count_totals
from past_ray.rl.rollout_table import read_rollouts
from past_ray.runtime.checkpoints import checkpoint_folder
from past_ray.runtime.controller import METRICS_FILE, RUN_FILE
from past_ray.storage import read_jsonl

logger = logging.getLogger(__name__)

REL_TOLERANCE = 1e-4
"""Metrics count as equal within this: other numbers of ranks or threads add in another order."""

ABS_TOLERANCE = 1e-6
"""For metrics that are near 0, as the loss of an on-policy step is."""

FIXED_KEYS = ("learning_rate", "weight_decay", "lora")
"""A checkpoint brings its own: its optimizer was made with them."""


class RunRecord(StrictConfig):
    """``rl.json``: what a replay has to know about a run."""

    init_folder: Path
    """Weights that the run started from."""

    reference_folder: Path
    """Weights of the KL penalty."""

    seed: int
    """Seed of the run."""

    rl: RLConfig
    """Its settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A step trained again."""

    step: int
    """The step."""

    start: int
    """Step of the checkpoint that it began from; 0 is the start of the run."""

    is_changed: bool
    """Whether settings were overridden."""

    metrics: dict[str, float]
    """What the step gave now."""

    logged: dict[str, float | None]
    """The same metrics as the run had logged them; empty if it had not."""

    @property
    def differing(self) -> list[str]:
        """Metrics that are not what the run had logged."""
        return [
            key
            for key, value in self.metrics.items()
            if key in self.logged and not _is_close(value, self.logged[key])
        ]


def replay_step(
    work_dir: Path,
    step: int,
    *,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    device: str = "cpu",
) -> Replay:
    """Train ``step`` again from the nearest checkpoint before it.

    Args:
        work_dir: Work directory of an RL run.
        step: Policy version that the step leads to, from 1.
        overrides: Settings for this step, e.g. ``rl.algorithm.kind=gspo``, which brings the
            defaults of GSPO.
        out: Folder for a checkpoint of the weights after the step.
        device: ``cpu`` or a CUDA device.

    Raises:
        ConfigError: If ``work_dir`` is no RL run, or an override cannot act on one step.
        DataError: If the rollouts of a step on the way are missing or malformed.
        StorageError: If the model that the run started from is gone.
    """
    record = _read_record(work_dir)
    changed = _changed_record(work_dir, record, overrides)
    if step < 1:
        raise ConfigError(f"--step must be at least 1, got {step}. Steps are counted from 1.")
    start = _nearest_checkpoint(work_dir, before=step)
    resume_from = checkpoint_folder(work_dir, start) if start else None
    with tempfile.TemporaryDirectory(prefix="past_ray_replay_") as scratch:
        learner = _load(record, resume_from, device=device)
        for between in range(start + 1, step):
            _train(learner, work_dir, between, record.rl)
        if changed != record:
            if start < step - 1:
                resume_from = Path(scratch, "before")
                learner.save(resume_from)
            learner = _load(changed, resume_from, device=device)
        metrics = _train(learner, work_dir, step, changed.rl)
    if out is not None:
        learner.save(out)
    return Replay(
        step=step,
        start=start,
        is_changed=changed != record,
        metrics=metrics,
        logged=_logged_row(work_dir, step, metrics),
    )


def replay_json(replay: Replay) -> str:
    """Return a replay as JSON."""
    finite = {k: v if math.isfinite(v) else None for k, v in replay.metrics.items()}
    values = {
        "step": replay.step,
        "start": replay.start,
        "is_changed": replay.is_changed,
        "metrics": finite,
        "logged": replay.logged,
        "differing": replay.differing,
    }
    return json.dumps(values, indent=2)


def _train(learner: GRPOLearner, work_dir: Path, step: int, rl: RLConfig) -> dict[str, float]:
    """Take one step on stored groups; the same metrics as the run's, less its timings."""
    groups = read_rollouts(work_dir, step)
    samples = build_train_samples(groups, rl=rl)
    totals = count_totals(samples, rollout_token_limit=rl.max_new_tokens)
    logger.info("training step %d on %d rollouts", step, len(samples))
    return {
        **rollout_metrics(groups),
        **staleness_metrics(groups, learner_version=step - 1),
        **learner.train_step(samples, totals=totals),
    }


def _load(record: RunRecord, resume_from: Path | None, *, device: str) -> GRPOLearner:
    learner = GRPOLearner(record.rl, device=device)
    learner.load(record.init_folder, reference=record.reference_folder, resume_from=resume_from)
    return learner


def _read_record(work_dir: Path, overrides: Sequence[str] = ()) -> RunRecord:
    path = work_dir / RUN_FILE
    if not path.is_file():
        raise ConfigError(
            f"{work_dir} must be the work directory of an RL run, found no {RUN_FILE}. Give e.g. "
            "runs/demo/work/rl_source_1."
        )
    return load_config(RunRecord, path, overrides)


def _changed_record(work_dir: Path, record: RunRecord, overrides: Sequence[str]) -> RunRecord:
    """Return the record with overrides, whose keys must be of ``rl``."""
    for text in overrides:
        section, _, key = text.partition("=")[0].partition(".")
        if section != "rl" or key.split(".")[0] in FIXED_KEYS:
            raise ConfigError(
                f"override {text!r} must set a key of rl other than {', '.join(FIXED_KEYS)}, which "
                "belong to the optimizer of the checkpoint. Start a new run to change those."
            )
    kinds = [text.partition("=") for text in overrides if text.startswith("rl.algorithm.kind=")]
    others = [text for text in overrides if not text.startswith("rl.algorithm.kind=")]
    # Another algorithm has other keys, and for equal ones its own defaults.
    sections = [
        f"rl.algorithm={{kind: {kind}}}" for _, _, kind in kinds if kind != record.rl.algorithm.kind
    ]
    changed = _read_record(work_dir, [*sections, *others])
    if changed.rl.kl.reference == record.rl.kl.reference:
        return changed
    if changed.rl.kl.reference == "init":
        return changed.model_copy(update={"reference_folder": record.init_folder})
    raise ConfigError(
        "rl.kl.reference=sft must be what the run had, found init: rl.json does not name the model "
        "after SFT. Leave the setting."
    )


def _nearest_checkpoint(work_dir: Path, *, before: int) -> int:
    """Return the newest step before ``before`` with a whole checkpoint; 0 if there is none."""
    for step in range(before - 1, 0, -1):
        folder = checkpoint_folder(work_dir, step)
        if folder.is_dir():
            try:
                verify_checkpoint(folder)
            except StorageError as error:
                logger.warning("not starting from %s: %s", folder.name, error)
            else:
                return step
    return 0


def _logged_row(work_dir: Path, step: int, metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return what the run logged for the step, less what a replay has not."""
    rows = [row for row in read_jsonl(work_dir / METRICS_FILE) if row["step"] == step]
    return {key: rows[-1][key] for key in metrics if key in rows[-1]} if rows else {}


def _is_close(value: float, logged: float | None) -> bool:
    """Compare with a logged number, for which NaN and infinity were written as null."""
    if logged is None:
        return not math.isfinite(value)
    return math.isclose(value, logged, rel_tol=REL_TOLERANCE, abs_tol=ABS_TOLERANCE)
