"""The RL loop, synchronous: sample, train, sync, repeat.

::

            +---------------- step k ----------------+
    examples -> collect -> groups -> samples -> train_step -> sync_weights(k + 1) -> step k + 1
                   |                                 |               |
            RolloutWorker[n]                  LearnerActor[r]  GeneratorActor[k]

    who             consumes                    waits for                    unblocked by
    RolloutWorker   the step's examples         weights of version k         sync_weights(k)
    GeneratorActor  prompts                     requests                     any RolloutWorker
    LearnerActor    samples of all groups       the step's last group        collect
    controller      metrics, parity gap         the slowest generator        sync_weights(k + 1)

Nothing runs ahead, so staleness is 0 by construction; it is checked all the same, because a
generator that missed a sync looks like nothing else. The loop is a function of its arguments:
continued from a checkpoint it gives the same weights as without the interruption.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from past_ray.config.rl import RLConfig
from past_ray.errors import ClusterError, DataError
from past_ray.rl.batching import build_train_samples
from past_ray.rl.metrics import rollout_metrics
from past_ray.rl.staleness import split_by_staleness
from past_ray.rl.types import RolloutGroup, SamplingParams
from past_ray.runtime.session import RLSession
from past_ray.sft.schedule import example_order
from past_ray.storage import append_jsonl, read_jsonl, write_text
from past_ray.tasks.examples import QAExample

OnStep = Callable[[dict[str, float]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RLRun:
    """What one GRPO run starts from and where it writes."""

    init_folder: Path
    """Weights the policy starts from."""

    reference_folder: Path
    """Weights the KL penalty pulls towards."""

    work_dir: Path
    """Holds ``metrics.jsonl`` and the checkpoints ``step-000012``."""

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

    Args:
        session: Open actors.
        run: Start, references and folders.
        rl: Settings of the algorithm.
        examples: Questions to roll out; each step takes ``rl.prompts_per_step`` of them.
        probe: Prompts of the parity probe, as token ids.
        on_step: Called with the metrics of every step.

    Raises:
        ClusterError: If too many rollouts of a step failed, or a sync did not arrive.
        ParityError: If generator and learner disagree after a sync.
    """
    if len(examples) < rl.prompts_per_step:
        raise DataError(
            f"rl.prompts_per_step must not exceed the questions, got {rl.prompts_per_step} over "
            f"{len(examples)} questions. Lower rl.prompts_per_step."
        )
    order = example_order(
        len(examples), num_steps=rl.num_steps, batch_size=rl.prompts_per_step, seed=run.seed
    )
    first_step = await _load(session, run, rl)
    await session.sync_weights(first_step, probe=probe)
    for step in range(first_step, rl.num_steps):
        started = time.perf_counter()
        groups = await session.collect(
            [examples[index] for index in order[step]],
            group_size=rl.group_size,
            sampling=SamplingParams(temperature=rl.temperature, max_new_tokens=rl.max_new_tokens),
            step=step,
            seed=run.seed,
        )
        _check(groups, step, rl)
        sampled = time.perf_counter()
        samples = build_train_samples(
            groups, scale_by_std=rl.scale_by_std, keep_constant_groups=rl.kl_coefficient > 0
        )
        metrics = await session.train_step(samples)
        trained = time.perf_counter()
        sync = await session.sync_weights(step + 1, probe=probe)
        seconds = time.perf_counter() - started
        rollouts = rollout_metrics(groups)
        row = {
            "step": step + 1,
            **rollouts,
            **metrics,
            "logprob_gap": sync.logprob_gap,
            "sync_seconds": sync.seconds,
            "seconds": seconds,
            "generation_seconds": sampled - started,
            "learner_seconds": trained - sampled,
            "tokens_per_s": rollouts["num_tokens"] / (sampled - started),
        }
        # Before the checkpoint: a run killed in between forgets the row, never the step.
        append_jsonl(run.work_dir / "metrics.jsonl", row)
        if (step + 1) % rl.checkpoint_every_steps == 0 or step + 1 in _kept(run, rl):
            await _save(session, run, rl, step + 1)
        on_step(row)
    return checkpoint_folder(run.work_dir, rl.num_steps)


def checkpoint_folder(work_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` optimizer steps; a Hugging Face folder."""
    return work_dir / f"step-{step:06d}"


def _kept(run: RLRun, rl: RLConfig) -> set[int]:
    return {*run.keep_steps, rl.num_steps}


async def _load(session: RLSession, run: RLRun, rl: RLConfig) -> int:
    """Load the newest checkpoint, or the start, and forget the metrics of steps beyond it."""
    steps = [int(path.name.removeprefix("step-")) for path in run.work_dir.glob("step-*")]
    newest = max(steps, default=0)
    log = run.work_dir / "metrics.jsonl"
    rows = [row for row in read_jsonl(log) if row["step"] <= newest]
    write_text(log, "".join(json.dumps(row) + "\n" for row in rows))
    return await session.load_learners(
        run.init_folder,
        reference=run.reference_folder if rl.kl_coefficient > 0 else None,
        resume_from=checkpoint_folder(run.work_dir, newest) if newest else None,
    )


async def _save(session: RLSession, run: RLRun, rl: RLConfig, step: int) -> None:
    """Write a checkpoint, then delete older ones that nobody asked to keep."""
    await session.save_learners(checkpoint_folder(run.work_dir, step))
    for path in sorted(run.work_dir.glob("step-*")):
        older = int(path.name.removeprefix("step-"))
        if older < step and older not in _kept(run, rl):
            shutil.rmtree(path)


def _check(groups: Sequence[RolloutGroup], step: int, rl: RLConfig) -> None:
    """Stop on stale rollouts and on a step of which too much failed."""
    _, stale = split_by_staleness(groups, learner_version=step, max_staleness=0)
    if stale:
        versions = sorted({rollout.policy_version for group in stale for rollout in group.rollouts})
        raise ClusterError(
            f"step {step} must be sampled by policy version {step}, found versions {versions} in "
            f"{len(stale)} groups: a generator missed a weight sync."
        )
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    failed = [rollout for rollout in rollouts if rollout.reward is None]
    if len(failed) > rl.max_rollout_error_frac * len(rollouts):
        raise ClusterError(
            f"at most {rl.max_rollout_error_frac:.0%} of a step's rollouts may fail "
            f"(rl.max_rollout_error_frac), {len(failed)} of {len(rollouts)} did in step {step}; "
            f"first: {failed[0].error}"
        )
