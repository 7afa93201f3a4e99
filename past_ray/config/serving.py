"""What the served policy looks like, who may ask it, and where it listens."""

from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from past_ray.config.base import StrictConfig

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine can reach."""


class PolicyServingConfig(StrictConfig):
    """The engine behind the endpoint and the token in front of it."""

    # A secret pasted into the wrong field must not come back in the error message.
    model_config = ConfigDict(hide_input_in_errors=True)

    model_id: str = Field(default="past-policy", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name that requests give as ``model``."""

    accelerator: Literal["cpu", "gpu"] = "cpu"
    """Device of the engine; never chosen silently."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Dtype of weights and activations; ``auto`` is the checkpoint's own."""

    max_model_len: int | None = Field(default=None, ge=8)
    """Longest prompt plus completion, in tokens. None is the model's own limit."""

    max_num_seqs: int = Field(default=16, ge=1)
    """Requests decoded together by one replica; further ones wait."""

    kv_cache_gib: float | None = Field(default=0.25, gt=0)
    """Key-value cache of one worker, in GiB. None lets the engine take its share of memory."""

    gpu_memory_frac: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that the engine may use."""

    enforce_eager: bool = True
    """Skip graph capture and compilation: starts faster, decodes slower on GPUs."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Workers that share one copy of the model; on GPUs, the GPUs of one replica."""

    num_replicas: int = Field(default=1, ge=1)
    """Copies of the model that share the requests."""

    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for one worker; a fraction is allowed."""

    threads_per_worker: int = Field(default=1, ge=1)
    """OpenMP threads of one worker. More threads than idle cores make it slower, not faster."""

    token_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable, on the nodes, that holds the bearer token."""

    token_file: Path | None = None
    """File, readable on the nodes, whose content is the bearer token."""

    @model_validator(mode="after")
    def _one_token_source(self) -> Self:
        if self.token_env is not None and self.token_file is not None:
            raise ValueError(
                "at most one of token_env and token_file may be set, got both. Remove one."
            )
        return self

    @property
    def requires_token(self) -> bool:
        """Whether requests need a bearer token."""
        return self.token_env is not None or self.token_file is not None

    @property
    def num_workers(self) -> int:
        """Engine workers of all replicas together."""
        return self.num_replicas * self.tensor_parallel_size

    @property
    def demanded_cpus(self) -> float:
        """CPUs that Ray must have for all replicas."""
        return self.num_workers * self.cpus_per_worker

    @property
    def demanded_gpus(self) -> int:
        """GPUs that Ray must have for all replicas."""
        return self.num_workers if self.accelerator == "gpu" else 0


class PolicyAppArgs(PolicyServingConfig):
    """Arguments of the Serve application, as in ``serve/policy.yaml``."""

    model_path: Path
    """Hugging Face folder: config.json, weights, tokenizer with a chat template."""


class ServingConfig(PolicyServingConfig):
    """One policy endpoint started by ``past-ray serve`` or at the end of the demo."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but a loopback address needs a token."""

    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port; 0 picks a free one."""

    startup_timeout_s: float = Field(default=600.0, gt=0)
    """Give up when the endpoint does not answer after this time."""

    @model_validator(mode="after")
    def _open_only_to_this_machine(self) -> Self:
        if self.host not in LOOPBACK_HOSTS and not self.requires_token:
            raise ValueError(
                f"an endpoint without a token must listen on one of {', '.join(LOOPBACK_HOSTS)}, "
                "got another host. Set token_env or token_file, or listen on 127.0.0.1."
            )
        return self

    def app_args(self, model_path: Path) -> PolicyAppArgs:
        """Return the application's arguments for the model in ``model_path``."""
        settings = self.model_dump(include=set(PolicyServingConfig.model_fields))
        return PolicyAppArgs(model_path=model_path, **settings)
