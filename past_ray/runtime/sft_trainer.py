"""Supervised fine-tuning on Ray Train: a plan in Parquet, one FSDP rank per worker.

::

    train_sft (driver)          writes the plan, starts Ray Train, tails metrics.jsonl
        |  TorchTrainer(datasets={"shard_0": ..., "shard_1": ...})
        v
    sft_rank.run_rank (worker)  get_dataset_shard("shard_RANK") -> SFTLearner.train_step
        |                       rank 0 appends to metrics.jsonl
        v
    WORK_DIR/train/sft/checkpoint_*   weights, optimizer and records, through ray.train.report

Each rank reads a data set of its own instead of one split of a common one: a streaming split hands
out whole blocks as they arrive, and the order inside a step would depend on its block sizes.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2.api.config import LoggingConfig

from past_ray.config.runtime import RuntimeConfig
from past_ray.config.sft import SFTConfig
from past_ray.errors import ClusterError, ConfigError, PastRayError
from past_ray.runtime.sft_rank import (
    METRICS_FILE,
    NOTICE_INTERVAL_S,
    RUN_NAME,
    kept_folder,
    run_rank,
)
from past_ray.sft.examples import SFTExample
from past_ray.sft.plan import hash_examples, write_plan
from past_ray.sft.schedule import example_order
from past_ray.skill.checkpoint import hash_weights
from past_ray.storage import atomic_directory, read_jsonl, write_json

FINGERPRINT_FILE = "fingerprint.json"
RESULT_FILE = "result.json"

POLL_INTERVAL_S = 0.2
"""How often metrics are passed on, and how often Ray Train looks at its workers.

Its own default of 2 s would make up a good part of a run of seconds.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTResult:
    """What a finished run reports."""

    losses: list[float]
    """Mean loss per token of every step, before its update."""

    seconds: float
    """Wall time of the call that finished the run, with start-up."""

    num_tokens: int
    """Tokens with loss over all steps."""


def train_sft(
    *,
    examples: Sequence[SFTExample],
    init_folder: Path,
    out_folder: Path,
    sft: SFTConfig,
    runtime: RuntimeConfig,
    seed: int,
    work_dir: Path,
    keep_steps: tuple[int, ...] = (),
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> SFTResult:
    """Train ``init_folder`` on examples and write the result as a plain fp32 model folder.

    The same call continues a run that was killed, from its last checkpoint, to the same weights. A
    run that is told that one of its nodes goes away saves a checkpoint and moves by itself.

    Args:
        examples: The data set; drawn in seeded epoch shuffles.
        init_folder: Hugging Face folder to start from.
        out_folder: Where the final model goes, with tokenizer and chat template.
        sft: The recipe.
        runtime: Workers and what each asks of the cluster.
        seed: Seed of the order, of adapter weights and of dropout.
        work_dir: Plan, checkpoints and metrics of this run alone; on storage all nodes share.
        keep_steps: Numbers of steps after which the model is also written, as ``NAME-stepN``.
        on_step: Called in this thread with every line of metrics.jsonl: ``step``, ``loss``, ``lr``,
            ``grad_norm``, ``tokens``, ``seconds``. A resumed run repeats the earlier steps' lines.

    Raises:
        ConfigError: The recipe, the cluster or ``work_dir`` cannot do this run.
        ClusterError: A worker failed; its own error is the cause.
    """
    started = time.perf_counter()
    sft = sft.resolved(len(examples))
    work_dir, init_folder, out_folder = (
        path.resolve() for path in (work_dir, init_folder, out_folder)
    )
    _check(examples, sft=sft, runtime=runtime, keep_steps=keep_steps)
    _claim(work_dir, examples=examples, init_folder=init_folder, sft=sft, seed=seed)
    finished = _finished_result(work_dir, out_folder, keep_steps)
    if finished is not None:
        return finished
    job = {
        "init_folder": str(init_folder),
        "out_folder": str(out_folder),
        "work_dir": str(work_dir),
        "sft": sft.model_dump(mode="json"),
        "seed": seed,
        "keep_steps": list(keep_steps),
        "num_threads": runtime.threads_per_process,
    }
    files = _write_plan(work_dir / "plan", examples, sft, seed=seed, runtime=runtime)
    metrics_file = work_dir / METRICS_FILE
    metrics_file.unlink(missing_ok=True)
    _fit_and_follow(_trainer(job, files, runtime), metrics_file, on_step, runtime=runtime)
    return _finish(work_dir, seconds=time.perf_counter() - started)


def _check(
    examples: Sequence[SFTExample],
    *,
    sft: SFTConfig,
    runtime: RuntimeConfig,
    keep_steps: tuple[int, ...],
) -> None:
    """Refuse what would fail or hang later."""
    if not examples:
        raise ConfigError("SFT must have examples, got none. Check the documents table.")
    if sft.batch_size % runtime.num_sft_workers:
        raise ConfigError(
            "sft.batch_size must be a multiple of runtime.num_sft_workers, got "
            f"{sft.batch_size} over {runtime.num_sft_workers} workers. Change one of them."
        )
    if not all(1 <= step <= sft.num_steps for step in keep_steps):
        raise ConfigError(
            f"keep_steps must lie between 1 and sft.num_steps = {sft.num_steps}, got "
            f"{list(keep_steps)}."
        )
    supply = ray.cluster_resources()
    num_cpus = runtime.num_sft_workers * runtime.cpus_per_sft_worker + runtime.cpus_for_data
    if num_cpus > supply.get("CPU", 0):
        raise ConfigError(
            "runtime.num_sft_workers * runtime.cpus_per_sft_worker + runtime.cpus_for_data must "
            f"fit the cluster, got {runtime.num_sft_workers} * {runtime.cpus_per_sft_worker} + "
            f"{runtime.cpus_for_data} = {num_cpus} over {supply.get('CPU', 0)} CPUs. Ask for "
            "fewer or smaller workers."
        )
    if runtime.use_gpu and runtime.num_sft_workers > supply.get("GPU", 0):
        raise ConfigError(
            "runtime.num_sft_workers must not exceed the GPUs with runtime.use_gpu, got "
            f"{runtime.num_sft_workers} workers over {supply.get('GPU', 0)} GPUs."
        )


def _claim(
    work_dir: Path,
    *,
    examples: Sequence[SFTExample],
    init_folder: Path,
    sft: SFTConfig,
    seed: int,
) -> None:
    """Write what decides the result into ``work_dir``, or check that it is the same as before."""
    fingerprint = {
        "examples": hash_examples(examples),
        "init_weights": hash_weights(init_folder),
        "sft": sft.model_dump(mode="json"),
        "seed": seed,
    }
    file = work_dir / FINGERPRINT_FILE
    if file.exists():
        earlier = cast("dict[str, object]", json.loads(file.read_text(encoding="utf-8")))
        changed = [key for key in fingerprint if earlier.get(key) != fingerprint[key]]
        if changed:
            raise ConfigError(
                f"{work_dir} must belong to the same run, but its {changed} differ. Delete it to "
                "start again or choose another directory."
            )
    write_json(file, fingerprint)


def _write_plan(
    folder: Path,
    examples: Sequence[SFTExample],
    sft: SFTConfig,
    *,
    seed: int,
    runtime: RuntimeConfig,
) -> list[list[Path]]:
    """Write the plan into ``folder``, atomically; return each rank's files."""
    order = example_order(
        len(examples), num_steps=sft.num_steps, batch_size=sft.batch_size, seed=seed
    )
    with atomic_directory(folder) as writing:
        files = write_plan(writing, examples, order, num_ranks=runtime.num_sft_workers)
    return [[folder / file.relative_to(writing) for file in rank_files] for rank_files in files]


def _finished_result(
    work_dir: Path, out_folder: Path, keep_steps: tuple[int, ...]
) -> SFTResult | None:
    """Return the result of a run that has already written all its models."""
    file = work_dir / RESULT_FILE
    models = [out_folder, *(kept_folder(out_folder, step) for step in keep_steps)]
    if not file.exists() or not all((model / "config.json").exists() for model in models):
        return None
    return SFTResult(**json.loads(file.read_text(encoding="utf-8")))


def _finish(work_dir: Path, *, seconds: float) -> SFTResult:
    """Collect the result from the metrics and delete what only resumption needs."""
    by_step = {int(record["step"]): record for record in read_jsonl(work_dir / METRICS_FILE)}
    records = [by_step[step] for step in sorted(by_step)]
    losses = [float(record["loss"]) for record in records]
    num_tokens = sum(int(record["tokens"]) for record in records)
    write_json(
        work_dir / RESULT_FILE, {"losses": losses, "seconds": seconds, "num_tokens": num_tokens}
    )
    shutil.rmtree(work_dir / "train", ignore_errors=True)
    return SFTResult(losses=losses, seconds=seconds, num_tokens=num_tokens)


class _LeanTrainer(TorchTrainer):
    """Ray Train without the actor that frees placement groups after a crashed controller.

    Ray frees them with the driver that owns them. The actor asks the dashboard once a second, and
    complains once a second where there is none.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]


def _trainer(job: dict[str, Any], files: list[list[Path]], runtime: RuntimeConfig) -> TorchTrainer:
    """Build the trainer; the cluster is not touched yet."""
    resources = {"CPU": runtime.cpus_per_sft_worker}
    if runtime.use_gpu:
        resources["GPU"] = 1
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # The second reader starts a pool of actors for Parquet footers: seconds for a few small files.
    context.use_datasource_v2 = False
    # One reader runs per rank: together they fit the CPUs that are kept free for them.
    datasets = {
        f"shard_{rank}": ray.data.read_parquet(
            [str(file) for file in rank_files],
            num_cpus=runtime.cpus_for_data / runtime.num_sft_workers,
        )
        for rank, rank_files in enumerate(files)
    }
    return _LeanTrainer(
        run_rank,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if runtime.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=runtime.num_sft_workers,
            use_gpu=runtime.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=RUN_NAME,
            storage_path=str(Path(job["work_dir"]) / "train"),
            failure_config=ray.train.FailureConfig(
                max_failures=0, max_preemption_failures=-1, controller_failure_limit=0
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets=cast(Any, datasets),
        dataset_config=ray.train.DataConfig(
            datasets_to_split=[],
            execution_options=ray.data.ExecutionOptions(preserve_order=True),
        ),
    )


def _fit_and_follow(
    trainer: TorchTrainer,
    metrics_file: Path,
    on_step: Callable[[dict[str, Any]], None] | None,
    *,
    runtime: RuntimeConfig,
) -> None:
    """Run ``fit`` and pass metrics on as they appear.

    ``fit`` runs in a thread because in the main thread it takes over Ctrl-C and keeps it.
    """
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failures.append(error)

    with _train_settings(runtime):
        thread = threading.Thread(target=fit, name="sft-fit", daemon=True)
        thread.start()
        lines = _new_records(metrics_file)
        while True:
            is_running = thread.is_alive()
            for record in next(lines):
                if on_step is not None:
                    on_step(record)
            if not is_running:
                break
            thread.join(POLL_INTERVAL_S)
    if failures:
        raise _explained(failures[0]) from failures[0]


def _new_records(metrics_file: Path) -> Generator[list[dict[str, Any]]]:
    """Yield, again and again, the records that were added since the last time, in step order.

    The file may be replaced meanwhile, and workers of a killed driver may still add a line.
    """
    num_seen = position = inode = 0
    while True:
        fresh: list[dict[str, Any]] = []
        if metrics_file.exists():
            with metrics_file.open("rb") as file:
                current = os.fstat(file.fileno()).st_ino
                position, inode = (position if current == inode else 0), current
                file.seek(position)
                complete, newline, _ = file.read().rpartition(b"\n")
            position += len(complete) + len(newline)
            for record in map(json.loads, complete.splitlines()):
                if record["step"] == num_seen:
                    fresh.append(record)
                    num_seen += 1
        yield fresh


@contextlib.contextmanager
def _train_settings(runtime: RuntimeConfig) -> Generator[None]:
    """Set what Ray Train reads from the environment only, for the duration of a run."""
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_INTERVAL_S),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(runtime.placement_timeout_s),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": str(NOTICE_INTERVAL_S),
    }
    earlier = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _explained(error: Exception) -> PastRayError:
    """Turn Ray Train's error into ours, with the first worker's own message."""
    causes = list(cast("dict[int, Exception]", getattr(error, "worker_failures", {})).items())
    if not causes:
        return ClusterError(f"SFT must run on the cluster, but Ray Train failed: {error}")
    rank, failure = causes[0]
    cause = cast(Exception, getattr(failure, "_base_exc", failure))
    if isinstance(cause, PastRayError):
        return cause
    return ClusterError(
        f"Every SFT worker must finish, but rank {rank} raised {type(cause).__name__}: {cause}. "
        "The same call continues from the last checkpoint."
    )
