"""Start the policy app, wait until it answers, stop it and all that was started for it.

States of ``running_policy_app``; what a state started is undone when the block ends or fails:

| state | starts | fails with |
| --- | --- | --- |
| check | nothing | ConfigError: vLLM, model folder, token, port |
| Ray | a local Ray, if this process has none | ConfigError: fewer CPUs or GPUs than demanded |
| Serve | controller and HTTP proxy | ConfigError: Serve is already running there |
| app | ingress and engines | ClusterError: deployment failed, or took too long |
"""

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import ray
from ray import serve

from past_ray.config.serving import PolicyAppArgs, ServingConfig
from past_ray.errors import ClusterError, ConfigError
from past_ray.runtime.cluster import own_ray
from past_ray.serving.policy_app import build_app, check_before_start

logger = logging.getLogger(__name__)

APP_NAME = "policy"
"""Name of the application in Serve."""

POLL_S = 0.2
"""How often a starting or stopping app is looked at."""

PORT_RELEASE_TIMEOUT_S = 30.0
"""A stopped proxy must have given its port back within this time."""


@contextmanager
def running_policy_app(config: ServingConfig, model_path: Path) -> Generator[str]:
    """Serve the model in ``model_path`` for the duration of the block.

    Uses the Ray that this process is connected to; without one it starts a local Ray and ends it.
    In the main thread SIGTERM acts as Ctrl-C meanwhile: both stop all that was started here.

    Args:
        config: Engine, token, host and port.
        model_path: Hugging Face folder.

    Yields:
        The base URL, for example ``http://127.0.0.1:8000``, once it answers.

    Raises:
        ConfigError: Something is missing or does not fit; see the table above.
        ClusterError: The application did not come up.
    """
    args = config.app_args(model_path)
    check_before_start(args)
    port = claim_port(config.host, config.port)
    with ExitStack() as stack:
        stack.enter_context(_quiet_logs())
        is_own_ray = stack.enter_context(_connected_ray())
        stack.enter_context(_sigterm_as_interrupt())
        _check_supply(args)
        stack.enter_context(_running_serve(config.host, port, keep_ray=not is_own_ray))
        _deploy(args, timeout_s=config.startup_timeout_s)
        yield f"http://{_client_host(config.host)}:{port}"


def serve_forever(
    config: ServingConfig, model_path: Path, *, on_ready: Callable[[str], None]
) -> None:
    """Serve until Ctrl-C or SIGTERM, then stop cleanly. For the main thread.

    Args:
        config: As ``running_policy_app``.
        model_path: As ``running_policy_app``.
        on_ready: Called once with the base URL when the app answers.

    Raises:
        ConfigError: As ``running_policy_app``.
        ClusterError: As ``running_policy_app``.
    """
    with suppress(KeyboardInterrupt), running_policy_app(config, model_path) as base_url:
        on_ready(base_url)
        while True:
            time.sleep(1)


def claim_port(host: str, port: int) -> int:
    """Return ``port``, or a free one for 0, after checking that it can be bound.

    Raises:
        ConfigError: The port is taken, not allowed, or the host is no address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Only looks past connections in TIME_WAIT; a listening socket still refuses the bind.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        raise ConfigError(
            f"host and port must be an address that is free, got {host}:{port}: "
            f"{error.strerror}. Stop the program that listens there, or choose another port "
            "(0 picks a free one)."
        ) from error


@contextmanager
def _connected_ray() -> Generator[bool]:
    """Use this process's Ray, or start a local one and remove all of it afterwards.

    Yields:
        Whether the Ray is our own.
    """
    if ray.is_initialized():
        yield False
        return
    with own_ray():
        yield True


@contextmanager
def _running_serve(host: str, port: int, *, keep_ray: bool) -> Generator[None]:
    """Run Serve's controller and proxy; with ``keep_ray``, also give the port back at the end."""
    if serve.status().proxies:
        raise ConfigError(
            "past_ray must start Serve itself, found Serve already running in this Ray. "
            "Deploy to it with `serve deploy serve/policy.yaml`, or run `serve shutdown` first."
        )
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        yield
    finally:
        # Stops the engines in good order. What is left of Serve ends with a Ray of our own.
        if APP_NAME in serve.status().applications:
            serve.delete(APP_NAME)
        if keep_ray:
            serve.shutdown()
            _wait_until_free(host, port)


def _deploy(args: PolicyAppArgs, *, timeout_s: float) -> None:
    """Deploy the app and wait until it runs."""
    with _root_logger_kept():
        app = build_app(args)
    target = serve.RunTarget(
        target=app,
        name=APP_NAME,
        route_prefix="/",
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    serve.run_many(
        [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )
    deadline = time.monotonic() + timeout_s
    while True:
        overview = serve.status().applications[APP_NAME]
        if overview.status == "RUNNING":
            return
        if overview.status == "DEPLOY_FAILED" or time.monotonic() > deadline:
            reasons = [overview.message, *(part.message for part in overview.deployments.values())]
            raise ClusterError(
                f"the policy app must be running within {timeout_s:g} s, found "
                f"{overview.status.value}: {_short_reason(reasons)}"
            )
        time.sleep(POLL_S)


def _short_reason(messages: list[str]) -> str:
    """Log Serve's messages, which hold whole tracebacks, and return the last line of each."""
    known = [message.strip() for message in messages if message.strip()]
    if not known:
        return "it is still starting. Raise startup_timeout_s, or free CPUs for it."
    logger.error("%s", "\n".join(known))
    return " ".join(dict.fromkeys(message.splitlines()[-1] for message in known))


def _check_supply(args: PolicyAppArgs) -> None:
    supply = ray.cluster_resources()
    demand = {"CPU": args.demanded_cpus, "GPU": float(args.demanded_gpus)}
    for resource, demanded in demand.items():
        supplied = supply.get(resource, 0.0)
        if demanded > supplied:
            raise ConfigError(
                f"num_replicas * tensor_parallel_size workers demand {demanded:g} {resource}s, "
                f"Ray has {supplied:g}. Lower num_replicas, tensor_parallel_size or "
                "cpus_per_worker, or add nodes."
            )


def _wait_until_free(host: str, port: int) -> None:
    deadline = time.monotonic() + PORT_RELEASE_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(ConfigError):
            claim_port(host, port)
            return
        time.sleep(POLL_S)
    logger.warning("port %d is still taken %g s after the stop", port, PORT_RELEASE_TIMEOUT_S)


def _client_host(host: str) -> str:
    """Return an address that reaches a server on ``host`` from this machine."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


@contextmanager
def _sigterm_as_interrupt() -> Generator[None]:
    """Let SIGTERM unwind the stack; ``ray.init`` before it installs a handler that only dies."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(_signal_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _quiet_logs() -> Generator[None]:
    """Keep Serve's progress messages out of the terminal."""
    serve_logger = logging.getLogger("ray.serve")
    level = serve_logger.level
    serve_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        serve_logger.setLevel(level)


@contextmanager
def _root_logger_kept() -> Generator[None]:
    """Undo what importing ``ray.serve.llm`` does to the root logger: JSON lines, level INFO."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
