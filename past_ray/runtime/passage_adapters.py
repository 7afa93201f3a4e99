"""One LoRA adapter per passage, many at a time: a pool of actors that each hold the base once.

::

    driver   queue of passages -- one at a time --> worker 1   PassageTrainer -> OUT/p-0001
                                                --> worker 2   PassageTrainer -> OUT/p-0002
             AdapterResult     <-- losses --------  ...

    event                                  what follows
    ------------------------------------   ---------------------------------------------
    worker has loaded the base             it gets the next passage of the queue
    worker has written an adapter          its result is passed on; it gets the next one
    worker is lost                         its passage joins the queue again, a new worker starts
    lost again and again, nothing done     ClusterError
    queue empty                            the worker ends

An adapter does not depend on which worker trained it or after which others, so a run that is killed
and repeated, on any number of workers, gives the same files.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayTaskError

from past_ray.config.runtime import RuntimeConfig
from past_ray.config.single_passage import SinglePassageConfig
from past_ray.engine.passage_adapter import (
    AdapterTraining,
    PassageTrainer,
    adapter_fingerprint,
    finished_training,
)
from past_ray.errors import ClusterError, ConfigError, DataError, PastRayError
from past_ray.runtime.placement import process_environment
from past_ray.sft.examples import SFTExample
from past_ray.skill.checkpoint import hash_weights

MAX_LOST_IN_ROW = 3
"""Workers that may be lost between two finished adapters."""

FOLDER_NAME = re.compile(r"[\w-][\w.-]*")
"""A folder inside another one, and none of the hidden ones of ``atomic_directory``."""

Worker = Any
"""An actor handle; Ray types it as Any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageJob:
    """One adapter to train."""

    passage_id: str
    """Unique; the name of the adapter's folder."""

    examples: tuple[SFTExample, ...]
    """The sequences of the passage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterResult:
    """One adapter, trained now or by an earlier run."""

    passage_id: str
    """Of the job."""

    folder: Path
    """A PEFT folder."""

    loss_first: float
    """Mean loss per token over the first epoch, in nats."""

    loss_last: float
    """Mean loss per token over the last epoch, in nats."""

    num_tokens: int
    """Tokens with loss over all epochs."""

    seconds: float
    """Wall time of the training."""


class PassageWorkerShell:
    """What runs inside the actor process."""

    def __init__(
        self, model_folder: Path, config: SinglePassageConfig, *, base_hash: str, device: str
    ) -> None:
        """Store the settings; ``setup`` loads the base."""
        self._model_folder = model_folder
        self._config = config
        self._base_hash = base_hash
        self._device = device

    def setup(self) -> None:
        """Load the base."""
        self._trainer = PassageTrainer(
            self._model_folder, self._config, base_hash=self._base_hash, device=self._device
        )

    def train(self, job: PassageJob, folder: Path) -> AdapterTraining:
        """Forward to the trainer."""
        return self._trainer.train(job.examples, folder)


PassageWorkerActor = ray.remote(PassageWorkerShell)


def train_passage_adapters(
    jobs: Sequence[PassageJob],
    *,
    model_folder: Path,
    config: SinglePassageConfig,
    runtime: RuntimeConfig,
    out_folder: Path,
    on_done: Callable[[AdapterResult], None] | None = None,
) -> list[AdapterResult]:
    """Train an adapter per job, each into ``out_folder/PASSAGE_ID``; results in the jobs' order.

    The same call continues a run that was killed: a complete adapter of the same base, sequences
    and settings is not trained again.

    Args:
        jobs: The passages.
        model_folder: Hugging Face folder of the base.
        config: How every adapter is trained.
        runtime: ``num_sft_workers`` workers, what each asks of the cluster, and how long to wait.
        out_folder: On storage all nodes share.
        on_done: Called in this thread once per adapter, those that were there already first.

    Raises:
        DataError: Two jobs have one id, or an id is no plain folder name.
        ConfigError: No worker fits the cluster, or a passage cannot be trained on.
        ClusterError: Workers do not start, or are lost again and again.
    """
    _check(jobs, runtime)
    model_folder, out_folder = model_folder.resolve(), out_folder.resolve()
    base_hash = hash_weights(model_folder)
    results: dict[str, AdapterResult] = {}

    def finish(job: PassageJob, training: AdapterTraining) -> None:
        result = AdapterResult(
            passage_id=job.passage_id, folder=out_folder / job.passage_id, **asdict(training)
        )
        results[job.passage_id] = result
        if on_done is not None:
            on_done(result)

    missing: list[PassageJob] = []
    for job in jobs:
        fingerprint = adapter_fingerprint(job.examples, config, base_hash=base_hash)
        found = finished_training(out_folder / job.passage_id, fingerprint)
        if found is None:
            missing.append(job)
        else:
            finish(job, found)

    def create() -> Worker:
        device = "cuda" if runtime.use_gpu else "cpu"
        return PassageWorkerActor.options(**_worker_options(runtime)).remote(
            model_folder, config, base_hash=base_hash, device=device
        )

    with closing(_train_missing(missing, create, runtime, out_folder)) as trainings:
        for job, training in trainings:
            finish(job, training)
    return [results[job.passage_id] for job in jobs]


def _train_missing(
    jobs: Sequence[PassageJob],
    create: Callable[[], Worker],
    runtime: RuntimeConfig,
    out_folder: Path,
) -> Generator[tuple[PassageJob, AdapterTraining]]:
    """Yield trainings as they end; all workers have ended when this generator is closed."""
    queue = deque(jobs)
    # What each worker does now: train a job or, without one, load the base.
    calls: dict[ray.ObjectRef[AdapterTraining | None], tuple[Worker, PassageJob | None]] = {}
    num_lost = 0

    def start_worker() -> None:
        worker = create()
        calls[worker.setup.remote()] = (worker, None)

    try:
        for _ in range(min(runtime.num_sft_workers, len(jobs))):
            start_worker()
        while calls:
            call = _next_ended(calls, runtime)
            worker, job = calls[call]
            try:
                training = _value(call)
            except RayActorError as error:
                del calls[call]
                num_lost += 1
                _check_lost(num_lost, job, error)
                if job is not None:
                    queue.append(job)
                if queue:
                    start_worker()
                continue
            del calls[call]
            # Before the result is passed on: the worker need not wait for what is done with it.
            if queue:
                following = queue.popleft()
                folder = out_folder / following.passage_id
                calls[worker.train.remote(following, folder)] = (worker, following)
            else:
                ray.kill(worker)
            if job is not None and training is not None:
                num_lost = 0
                yield job, training
    finally:
        for worker, _ in calls.values():
            ray.kill(worker)


def _next_ended(
    calls: "dict[ray.ObjectRef[AdapterTraining | None], tuple[Worker, PassageJob | None]]",
    runtime: RuntimeConfig,
) -> "ray.ObjectRef[AdapterTraining | None]":
    """Wait for a call to end; as long as it takes, unless all workers are still starting."""
    is_training = any(job is not None for _, job in calls.values())
    timeout_s = None if is_training else runtime.placement_timeout_s + runtime.setup_timeout_s
    ended, _ = ray.wait(list(calls), timeout=timeout_s)
    if not ended:
        free = {name: ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU")}
        raise ClusterError(
            f"a worker must be placed and load the base within {timeout_s:.0f} s, none of "
            f"{len(calls)} did; free now are {free}. Wait for other jobs to end, lower "
            "runtime.cpus_per_sft_worker, or raise runtime.placement_timeout_s."
        )
    return ended[0]


def _value(call: "ray.ObjectRef[AdapterTraining | None]") -> AdapterTraining | None:
    try:
        return ray.get(call)
    except RayTaskError as error:
        cause = cast(Exception, error.cause)
        if isinstance(cause, PastRayError):
            raise cause from None
        raise ClusterError(
            f"a passage worker must not fail, but it raised {cause!r}. The same call continues "
            "after the adapters that are done."
        ) from error


def _check_lost(num_lost: int, job: PassageJob | None, error: RayActorError) -> None:
    if num_lost > MAX_LOST_IN_ROW:
        work = "it loaded the base" if job is None else f"it trained {job.passage_id}"
        raise ClusterError(
            f"at most {MAX_LOST_IN_ROW} passage workers may be lost without an adapter in between, "
            f"{num_lost} were, the last while {work}: {error}. Check the memory of the nodes; the "
            "same call continues after the adapters that are done."
        ) from error


def _worker_options(runtime: RuntimeConfig) -> dict[str, Any]:
    return {
        "num_cpus": runtime.cpus_per_sft_worker,
        "num_gpus": 1 if runtime.use_gpu else 0,
        "runtime_env": {"env_vars": process_environment(runtime)},
    }


def _check(jobs: Sequence[PassageJob], runtime: RuntimeConfig) -> None:
    """Refuse what would fail or hang later."""
    ids = [job.passage_id for job in jobs]
    repeated = [passage_id for passage_id, count in Counter(ids).items() if count > 1]
    unusable = [passage_id for passage_id in ids if not FOLDER_NAME.fullmatch(passage_id)]
    if repeated or unusable:
        raise DataError(
            "Every passage_id must be unique and name a folder (letters, digits, _, - and, not at "
            f"the start, dots), found repeated {repeated[:3]} and others {unusable[:3]}. Change "
            "these ids."
        )
    supply, needed = ray.cluster_resources(), {"CPU": runtime.cpus_per_sft_worker}
    if runtime.use_gpu:
        needed["GPU"] = 1
    if any(amount > supply.get(name, 0.0) for name, amount in needed.items()):
        raise ConfigError(
            f"runtime.cpus_per_sft_worker must fit the cluster, a worker asks for {needed} and "
            f"there are { ({name: supply.get(name, 0.0) for name in needed}) }. Ask for less."
        )
