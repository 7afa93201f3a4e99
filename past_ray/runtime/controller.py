"""The RL loop: sample, train, sync, repeat; the next steps' rollouts are sampled meanwhile.

::

              +----------------------- step k -------------------------+
    examples -> start(k .. k + max_staleness) -> groups of k -> train_step -> sync(k + 1) -> k + 1
                   |                                                |             |
            RolloutWorker[n]                                LearnerActor[r]  GeneratorActor[g]

    who             consumes                  waits for                     unblocked by
    StepSampler     questions of step k       version k - max_staleness     sync(k - max_staleness)
    GeneratorActor  prompts                   requests; a sync in progress  any RolloutWorker
    LearnerActor    samples of all groups     the step's last group         StepSampler
    controller      metrics, parity gap       the slowest generator         sync(k + 1)

The staleness rule: the groups of step k are begun when the generators hold version
``k - max_staleness`` or a later one, and they train at version k. So no rollout is older than
``max_staleness``, nothing has to be thrown away to keep the bound, and nobody can wait in a circle:
step k waits for a version that was synced before it began. The bound is checked all the same,
because a generator that missed a sync looks like nothing else.

With ``max_staleness`` 0 nothing runs ahead and the loop is a function of its arguments: continued
from a checkpoint, or after any process was lost, it gives the same weights bit for bit (on CPU).
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from past_ray.config.rl import RLConfig
from past_ray.rl.batching import build_train_samples
from past_ray.rl.metrics import rollout_metrics, staleness_metrics
from past_ray.rl.rollout_table import write_rollouts
from past_ray.rl.types import RolloutGroup
from past_ray.runtime.checkpoints import CheckpointStore, checkpoint_folder
from past_ray.runtime.learner_group import LearnersLostError
from past_ray.runtime.preemption import PreemptionNotice
from past_ray.runtime.run_state import read_buffer, write_buffer
from past_ray.runtime.session import RLSession
from past_ray.runtime.step_checks import SpreadWatch, check_failures, stopped_on_request
from past_ray.runtime.step_sampler import SampledStep, StepSampler
from past_ray.runtime.weight_sync import SyncResult
from past_ray.storage import append_jsonl, read_jsonl, write_json, write_text
from past_ray.tasks.examples import QAExample

logger = logging.getLogger(__name__)

OnStep = Callable[[dict[str, float]], None]

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "rl.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RLRun:
    """What one GRPO run starts from and where it writes."""

    init_folder: Path
    """Weights the policy starts from."""

    reference_folder: Path
    """Weights the KL penalty pulls towards."""

    work_dir: Path
    """Holds ``rl.json``, ``metrics.jsonl``, ``rollouts/`` and the checkpoints ``step-000012``."""

    seed: int
    """Seed of the order of questions and of sampling."""

    keep_steps: tuple[int, ...] = ()
    """Steps whose checkpoint outlives the run."""


async def train_grpo(
    session: RLSession,
    run: RLRun,
    rl: RLConfig,
    *,
    examples: Sequence[QAExample],
    probe: Sequence[list[int]],
    on_step: OnStep,
) -> Path:
    """Train for ``rl.num_steps`` and return the folder of the last checkpoint.

    Continues from the newest valid checkpoint in ``run.work_dir``, also when learners are lost on
    the way.

    Args:
        session: Open actors.
        run: Start, references and folders.
        rl: Settings of the algorithm.
        examples: Questions to roll out; each step takes ``rl.prompts_per_step`` of them.
        probe: Prompts of the parity probe, as token ids.
        on_step: Called with the metrics of every step.

    Raises:
        ClusterError: If too many rollouts of a step failed, a sync did not arrive, or processes
            were lost too often.
        ParityError: If generator and learner disagree after a sync.
        DataError: If one step wants more questions than there are, or no reward ever differs.
        PastRayError: If the run was told to stop; it saved a checkpoint before.
    """
    loop = _Loop(session, run, rl, examples=examples, probe=probe, on_step=on_step)
    _write_run_file(run, rl)
    async with PreemptionNotice() as notice:
        while True:
            try:
                await loop.train(notice)
            except LearnersLostError as error:
                logger.warning("%s; going back to the last checkpoint", error)
                await session.restart_learners()
            else:
                return checkpoint_folder(run.work_dir, rl.num_steps)


class _Loop:
    """One run; ``train`` may be entered again after learners were lost."""

    def __init__(
        self,
        session: RLSession,
        run: RLRun,
        rl: RLConfig,
        *,
        examples: Sequence[QAExample],
        probe: Sequence[list[int]],
        on_step: OnStep,
    ) -> None:
        self._session = session
        self._run = run
        self._rl = rl
        self._probe = probe
        self._on_step = on_step
        self._kept = {*run.keep_steps, rl.num_steps}
        self._store = CheckpointStore(run.work_dir, keep=self._kept)
        self._sampler = StepSampler(session, rl, examples=examples, seed=run.seed)
        self._spread = SpreadWatch(rl)

    async def train(self, notice: PreemptionNotice) -> None:
        """Load, then step by step until the end."""
        rl, session, sampler = self._rl, self._session, self._sampler
        first_step = await self._load()
        try:
            await session.sync_weights(first_step, probe=self._probe)
            for step in range(first_step, rl.num_steps):
                clock = _Clock(await session.generator_busy_s())
                for ahead in range(step, min(step + rl.max_staleness + 1, rl.num_steps)):
                    sampler.start(ahead)
                sampled = await self._groups(step, notice)
                groups = await sampler.fresh(step, sampled.groups)
                clock.lap("generation_seconds")
                check_failures(groups, step, max_frac=rl.max_rollout_error_frac)
                self._spread.add(groups, step)
                metrics = await session.train_step(build_train_samples(groups, rl=rl))
                sampler.drop(step)
                clock.lap("learner_seconds")
                sync = await session.sync_weights(step + 1, probe=self._probe)
                clock.lap("sync_wait_seconds")
                row = self._row(step, groups, sampled, metrics, sync)
                row |= clock.shares(await session.generator_busy_s())
                row["tokens_per_s"] = row["num_tokens"] / row["seconds"]
                await self._write(step, groups, row, notice)
        finally:
            sampler.cancel()

    async def _groups(self, step: int, notice: PreemptionNotice) -> SampledStep:
        """Wait for a step's groups; a notice meanwhile is answered without waiting for them."""
        ready = asyncio.ensure_future(self._sampler.ready(step))
        while not ready.done():
            given = asyncio.ensure_future(notice.given.wait())
            await asyncio.wait({ready, given}, return_when=asyncio.FIRST_COMPLETED)
            given.cancel()
            if notice.given.is_set():
                await self._save(step, notice)
        return ready.result()

    async def _write(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        row: dict[str, float],
        notice: PreemptionNotice,
    ) -> None:
        """Rollouts, then the row, then the checkpoint: a step that counts has all three."""
        await asyncio.to_thread(write_rollouts, self._run.work_dir, step + 1, groups)
        append_jsonl(self._run.work_dir / METRICS_FILE, row)
        is_due = (step + 1) % self._rl.checkpoint_every_steps == 0 or step + 1 in self._kept
        if is_due or notice.given.is_set():
            await self._save(step + 1, notice)
        self._on_step(row)

    async def _save(self, step: int, notice: PreemptionNotice) -> None:
        """Write a checkpoint with the groups that were sampled ahead, unless it exists."""
        folder = checkpoint_folder(self._run.work_dir, step)
        if step > 0 and not folder.exists():
            buffer = write_buffer(self._sampler.finished_ahead)
            await self._session.save_learners(folder, extra_files=buffer)
            await asyncio.to_thread(self._store.accept, step)
        notice.answered()
        if notice.must_stop:
            raise stopped_on_request(step)

    async def _load(self) -> int:
        """Load the newest checkpoint, or the start, and forget the metrics of steps beyond it."""
        run = self._run
        newest = await asyncio.to_thread(self._store.newest_valid)
        log = run.work_dir / METRICS_FILE
        rows = [row for row in read_jsonl(log) if row["step"] <= newest]
        write_text(log, "".join(json.dumps(row) + "\n" for row in rows))
        folder = checkpoint_folder(run.work_dir, newest) if newest else None
        step = await self._session.load_learners(
            run.init_folder,
            reference=run.reference_folder if self._rl.kl.coefficient > 0 else None,
            resume_from=folder,
        )
        if folder is not None:
            for ahead, groups in read_buffer(folder).items():
                self._sampler.start(ahead, finished=groups)
        return step

    def _row(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        sampled: SampledStep,
        metrics: Mapping[str, float],
        sync: SyncResult,
    ) -> dict[str, float]:
        return {
            "step": step + 1,
            **rollout_metrics(groups),
            **staleness_metrics(groups, learner_version=step),
            **metrics,
            "logprob_gap": sync.logprob_gap,
            "sync_seconds": sync.seconds,
            "constant_groups_dropped": float(sampled.num_constant),
            "discarded_rollouts": float(self._sampler.num_discarded),
            "requeued_groups": float(self._session.num_requeued),
            "restarts": float(self._session.num_restarts),
        }


class _Clock:
    """Where the time of one step went."""

    def __init__(self, generator_busy_s: float) -> None:
        self._started = self._last = time.perf_counter()
        self._generator_busy_s = generator_busy_s
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Book the time since the last lap under a name."""
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def shares(self, generator_busy_s: float) -> dict[str, float]:
        """Return laps, the step's seconds and the idle shares.

        ``generator_idle_frac`` is the share of the step in which an engine, on average over them,
        had nothing to decode; a replaced one counts from its return. ``learner_idle_frac`` is the
        share in which no gradient was computed.
        """
        seconds = time.perf_counter() - self._started
        busy = max(0.0, generator_busy_s - self._generator_busy_s)
        return {
            **self._laps,
            "seconds": seconds,
            "generator_idle_frac": max(0.0, 1 - busy / seconds),
            "learner_idle_frac": 1 - self._laps["learner_seconds"] / seconds,
        }


def _write_run_file(run: RLRun, rl: RLConfig) -> None:
    """Write what a replay needs to know about the run."""
    values: dict[str, Any] = {
        "init_folder": str(run.init_folder),
        "reference_folder": str(run.reference_folder),
        "seed": run.seed,
        "rl": rl.model_dump(mode="json"),
    }
    write_json(run.work_dir / RUN_FILE, values)
