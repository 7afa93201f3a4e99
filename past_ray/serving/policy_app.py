"""The policy app: the adapted model behind OpenAI's routes, hosted by ``ray.serve.llm``.

::

    HTTP proxy -> PolicyIngress (token, routes, /health) -> LLMServer[num_replicas] (vLLM)
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve import Application

from past_ray.config.serving import PolicyAppArgs
from past_ray.errors import ConfigError
from past_ray.serving.auth import read_token
from past_ray.serving.model_folder import check_model_folder, read_model_record

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig

ENGINE_CLASS = "past_ray.serving.local_engine.LocalFolderEngine"
"""Import path of the engine; Ray reads it from an environment variable of the replica."""

STOP_POLL_S = 0.2
"""How often a stopping replica looks whether its requests are done."""

STOP_TIMEOUT_S = 5.0
"""Requests that are not done after this time are cut off when the app stops."""

MAX_ONGOING_REQUESTS = 1_000
"""Requests that one replica accepts; those beyond ``max_num_seqs`` wait in the engine."""

BYTES_PER_GIB = 2**30


def build_app(args: PolicyAppArgs) -> Application:
    """Return the Serve application that hosts the model in ``args.model_path``.

    Needs a connected Ray. ``serve run serve/policy.yaml`` and ``launch.running_policy_app`` call
    this.

    Raises:
        ConfigError: vLLM is not installed, the model folder is incomplete, or the token that the
            configuration names is missing.
    """
    folder = check_before_start(args)
    # Imported here: these import vLLM, which takes seconds and may be missing.
    from ray.serve.llm import LLMConfig, build_llm_deployment

    llm_config = LLMConfig(**_llm_settings(args, model_source=str(folder)))
    return _bind_ingress(args, llm_config, build_llm_deployment(llm_config))


def check_before_start(args: PolicyAppArgs) -> Path:
    """Check all that can be checked without Ray; return the absolute model folder.

    Raises:
        ConfigError: As ``build_app``.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "serving needs vLLM, which is not installed. "
            f'Run `pip install "past_ray[{args.accelerator}]"`.'
        )
    read_token(token_env=args.token_env, token_file=args.token_file)
    folder = check_model_folder(args.model_path, max_model_len=args.max_model_len)
    read_model_record(folder)
    return folder


def _bind_ingress(args: PolicyAppArgs, llm_config: "LLMConfig", server: Application) -> Application:
    """Return the app: token check and OpenAI's routes in front of ``server``."""
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.serve.llm.ingress import make_fastapi_ingress

    from past_ray.serving.ingress import ENDPOINTS, PolicyIngress, build_http_app

    http_app = build_http_app(token_env=args.token_env, token_file=args.token_file)
    ingress: type[PolicyIngress] = make_fastapi_ingress(
        PolicyIngress, endpoint_map=ENDPOINTS, app=http_app
    )
    deployment: serve.Deployment = serve.deployment(
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_wait_loop_s=STOP_POLL_S,
        graceful_shutdown_timeout_s=STOP_TIMEOUT_S,
        ray_actor_options={"num_cpus": 0},
    )(ingress)
    folder = args.model_path.resolve()
    return deployment.bind(
        llm_deployments={args.model_id: server},
        model_cards={args.model_id: to_model_metadata(args.model_id, llm_config)},
        model_path=folder,
        record=read_model_record(folder),
        token_env=args.token_env,
        token_file=args.token_file,
    )


def _llm_settings(args: PolicyAppArgs, *, model_source: str) -> dict[str, Any]:
    """Return the arguments of ``LLMConfig``: one bundle per worker, all else through the engine."""
    bundle: dict[str, float] = {"CPU": args.cpus_per_worker}
    if args.accelerator == "gpu":
        bundle["GPU"] = 1
    return {
        "model_loading_config": {"model_id": args.model_id, "model_source": model_source},
        "accelerator_config": {"kind": args.accelerator},
        "placement_group_config": {"bundles": [bundle] * args.tensor_parallel_size},
        "engine_kwargs": _engine_settings(args),
        "deployment_config": {
            "num_replicas": args.num_replicas,
            "max_ongoing_requests": MAX_ONGOING_REQUESTS,
            "graceful_shutdown_wait_loop_s": STOP_POLL_S,
            "graceful_shutdown_timeout_s": STOP_TIMEOUT_S,
            "ray_actor_options": {"num_cpus": 0},  # the bundle already has the CPUs
        },
        "runtime_env": {"env_vars": _replica_environment(args.threads_per_worker)},
        "log_engine_metrics": False,
    }


def _engine_settings(args: PolicyAppArgs) -> dict[str, Any]:
    """Return vLLM's engine arguments; tokenizer and chat template come from the model folder."""
    settings: dict[str, Any] = {
        "dtype": args.dtype,
        "max_num_seqs": args.max_num_seqs,
        "enforce_eager": args.enforce_eager,
        "tensor_parallel_size": args.tensor_parallel_size,
    }
    if args.max_model_len is not None:
        settings["max_model_len"] = args.max_model_len
    if args.kv_cache_gib is not None:
        settings["kv_cache_memory_bytes"] = int(args.kv_cache_gib * BYTES_PER_GIB)
    if args.accelerator == "gpu":
        settings["gpu_memory_utilization"] = args.gpu_memory_frac
    return settings


def _replica_environment(threads_per_worker: int) -> dict[str, str]:
    """Return the variables of a replica, on top of those of the job. Never a secret."""
    job_environment = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    return {
        **job_environment,
        "RAYLLM_VLLM_ENGINE_CLS": ENGINE_CLASS,
        "OMP_NUM_THREADS": str(threads_per_worker),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas on one machine would bind the same cores
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a folder; nothing may be fetched
    }
