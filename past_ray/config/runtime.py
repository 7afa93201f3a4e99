"""Processes, their placement and their engines."""

from typing import Literal

from pydantic import Field, model_validator

from past_ray.config.base import StrictConfig


class GeneratorConfig(StrictConfig):
    """One generation engine."""

    backend: Literal["vllm", "transformers"] = "vllm"
    """``transformers`` is for machines on which vLLM cannot run; it is never chosen silently."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of weights and activations in the engine."""

    max_model_len: int = Field(default=256, ge=8)
    """Longest prompt plus completion, in tokens."""

    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences decoded together."""

    kv_cache_gib: float = Field(default=0.5, gt=0)
    """Key-value cache of one engine on CPU, in GiB."""

    gpu_memory_frac: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that the engine may use."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one engine."""

    enforce_eager: bool = True
    """Skip graph capture and compilation: starts faster, decodes slower on GPUs."""

    weight_transfer: Literal["object_store", "nccl", "ipc"] = "object_store"
    """How new weights reach the engine: Ray's object store (any device), vLLM's NCCL engine, or
    CUDA IPC between a learner and a generator on the same GPU (``colocate``)."""

    on_sync: Literal["finish", "resume"] = "finish"
    """What becomes of completions in flight when new weights arrive. ``finish``: they end under
    their version first. ``resume``: they are cut, keep their tokens, and go on with the new
    weights; each token is tagged with the version that sampled it."""

    sleep_between_steps: bool = False
    """Free the generator's GPU memory while the learner on the same GPU trains (``colocate``)."""

    @model_validator(mode="after")
    def _check_backend(self) -> "GeneratorConfig":
        if self.backend == "vllm":
            return self
        for name, default in (
            ("weight_transfer", "object_store"),
            ("on_sync", "finish"),
            ("sleep_between_steps", False),
        ):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}: {getattr(self, name)} needs backend: vllm, got {self.backend}. Leave "
                    f"it at {default}."
                )
        return self


class RuntimeConfig(StrictConfig):
    """How many processes of each role, and what each asks of the cluster."""

    address: str | None = None
    """Cluster to join. None joins the one in ``RAY_ADDRESS`` (``ray job submit`` sets it) or starts
    an own Ray on this machine; ``local`` always starts an own one."""

    num_generators: int = Field(default=1, ge=1)
    """Generator actors, one engine each."""

    num_learners: int = Field(default=1, ge=1)
    """Learner actors, one FSDP rank each."""

    num_rollout_workers: int = Field(default=1, ge=1)
    """Actors that drive environments."""

    num_sft_workers: int = Field(default=2, ge=1)
    """Ray Train workers, one FSDP rank each."""

    use_gpu: bool = False
    """One GPU per learner and SFT worker, ``tensor_parallel_size`` per generator."""

    cpus_per_generator: float = Field(default=1.0, gt=0)
    """CPUs that one generator asks for."""

    cpus_per_learner: float = Field(default=1.0, gt=0)
    """CPUs that one learner asks for."""

    cpus_per_rollout_worker: float = Field(default=0.1, gt=0)
    """CPUs that one rollout worker asks for."""

    cpus_per_sft_worker: float = Field(default=1.0, gt=0)
    """CPUs that one SFT worker asks for."""

    cpus_for_data: float = Field(default=1.0, ge=1)
    """CPUs kept free for Ray Data, or readers and trainers would wait for each other forever.

    Its Parquet reader starts an actor that asks for one whole CPU, so less than 1 hangs.
    """

    threads_per_process: int = Field(default=1, ge=1)
    """OpenMP threads of each process; processes that share cores want 1."""

    placement_timeout_s: float = Field(default=180.0, gt=0)
    """How long to wait for the cluster to place all actors."""

    setup_timeout_s: float = Field(default=600.0, gt=0)
    """How long one actor may take to load its weights."""

    sync_timeout_s: float = Field(default=600.0, gt=0)
    """How long one weight sync may take in all."""

    colocate: bool = False
    """Learner i shares the GPU of generator i, half each; needs as many of one as of the other."""

    heartbeat_interval_s: float = Field(default=2.0, gt=0)
    """Time between two heartbeats of an RL actor."""

    heartbeat_timeout_s: float = Field(default=60.0, gt=0)
    """An RL actor that is silent for this long is ended and replaced."""

    restart_backoff_s: float = Field(default=1.0, ge=0)
    """Pause before the first restart of an RL actor; doubles with each further one in a row."""

    max_restart_backoff_s: float = Field(default=60.0, ge=0)
    """Longest such pause."""

    max_restarts: int = Field(default=8, ge=0)
    """Failed restarts in a row that end a run; for learners all restarts of a run count."""

    object_store_gib: float = Field(default=1.0, gt=0)
    """Object store of an own Ray (``address: local``), in GiB."""

    generator: GeneratorConfig = GeneratorConfig()
    """The generation engine."""

    @model_validator(mode="after")
    def _check(self) -> "RuntimeConfig":
        generator = self.generator
        if self.colocate and not (
            self.use_gpu
            and self.num_learners == self.num_generators
            and generator.tensor_parallel_size == 1
        ):
            raise ValueError(
                "colocate needs use_gpu: true, num_learners equal to num_generators and "
                f"generator.tensor_parallel_size 1, got {self.use_gpu}, {self.num_learners}, "
                f"{self.num_generators} and {generator.tensor_parallel_size}."
            )
        if generator.weight_transfer == "nccl" and not self.use_gpu:
            raise ValueError(
                "generator.weight_transfer nccl needs use_gpu: true, got false. Use object_store."
            )
        if generator.weight_transfer == "nccl" and self.colocate:
            raise ValueError(
                "generator.weight_transfer nccl needs a GPU for each process, got colocate: true. "
                "Use ipc."
            )
        if generator.weight_transfer == "ipc" and not self.colocate:
            raise ValueError(
                "generator.weight_transfer ipc needs colocate: true (a learner and a generator on "
                "each GPU), got false. Use nccl or object_store."
            )
        if generator.sleep_between_steps and not self.colocate:
            raise ValueError(
                "generator.sleep_between_steps needs colocate: true (on GPUs that a learner and a "
                "generator share), got false. Without a shared GPU nobody uses the memory freed."
            )
        return self
