"""Metrics of every step to TensorBoard, Ray and, if asked for, Weights & Biases and MLflow.

::

    run_dir/tensorboard/<stage>/     event files, always written
    run_dir/tracking/wandb.json      the run at the service and the last step it has of each stage
    run_dir/tracking/mlflow.json

A chart has each step once, also when a run was killed and repeats steps: TensorBoard is told to
forget those from the first repeated one on, and a service that cannot forget is not sent a step
again. Tracking never stops training: a tracker that fails warns once and is left out from then on.
"""

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from past_ray.config.tracking import TrackingConfig
from past_ray.errors import ConfigError
from past_ray.pipelines.tracking_services import AppendOnly, MLflowService, WandbService
from past_ray.runtime.ray_metrics import RayMetrics

logger = logging.getLogger(__name__)

TENSORBOARD_DIR = "tensorboard"
TRACKING_DIR = "tracking"


class Tracker(Protocol):
    """Takes the metrics of every step."""

    def log(self, metrics: Mapping[str, float], *, step: int, stage: str) -> None:
        """Take the metrics of one step.

        Args:
            metrics: Values by name.
            step: Counted from 1 in each stage; a continued run may repeat some.
            stage: Name of the stage.
        """
        ...

    def close(self) -> None:
        """Write what is buffered."""
        ...


def check_tracking(config: TrackingConfig) -> None:
    """Refuse a service whose package is not installed; call it before a run starts.

    Raises:
        ConfigError: Names the package to install.
    """
    asked = {
        "wandb": ("tracking.wandb_project", config.wandb_project),
        "mlflow": ("tracking.mlflow_uri", config.mlflow_uri),
    }
    for package, (key, value) in asked.items():
        if value is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{key}={value} needs the package {package}, found none. Run `pip install "
                f"{package}` or remove the setting."
            )


def open_trackers(config: TrackingConfig, run_dir: Path, *, name: str) -> "Trackers":
    """Return one tracker that stands for all that are always there or configured.

    Nothing is opened before the first step. ``RayMetrics`` then needs a running Ray.

    Args:
        config: Checked by ``check_tracking``.
        run_dir: Gets the event files.
        name: Title of the run at the services.
    """
    opened: dict[str, Callable[[], Tracker]] = {
        "TensorBoard": lambda: TensorBoard(run_dir / TENSORBOARD_DIR),
        "Ray metrics": RayMetrics,
    }
    records, project, uri = run_dir / TRACKING_DIR, config.wandb_project, config.mlflow_uri
    if project is not None:
        opened["Weights & Biases"] = lambda: AppendOnly(
            WandbService(project, run_dir, name=name), records / "wandb.json"
        )
    if uri is not None:
        opened["MLflow"] = lambda: AppendOnly(
            MLflowService(uri, name=name), records / "mlflow.json"
        )
    return Trackers([Guarded(label, make) for label, make in opened.items()])


class Trackers:
    """Hands every step to several trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, metrics: Mapping[str, float], *, step: int, stage: str) -> None:
        """Hand on the finite metrics: a chart has no place for NaN, and services differ on it."""
        finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.log(finite, step=step, stage=stage)

    def close(self) -> None:
        """Close all of them."""
        for tracker in self._trackers:
            tracker.close()


class Guarded:
    """A tracker that may fail: it is opened at the first step and left out after an error."""

    def __init__(self, label: str, make: Callable[[], Tracker]) -> None:
        self._label = label
        self._make = make
        self._tracker: Tracker | None = None
        self._has_failed = False

    def log(self, metrics: Mapping[str, float], *, step: int, stage: str) -> None:
        """Log, or warn once."""
        if self._has_failed:
            return
        try:
            if self._tracker is None:
                self._tracker = self._make()
            self._tracker.log(metrics, step=step, stage=stage)
        except Exception as error:
            self._warn(f"step {step} of {stage}", error)

    def close(self) -> None:
        """Close, or warn once."""
        if self._tracker is None or self._has_failed:
            return
        try:
            self._tracker.close()
        except Exception as error:
            self._warn("closing it", error)

    def _warn(self, place: str, error: Exception) -> None:
        self._has_failed = True
        logger.warning(
            "%s failed at %s and is left out from now on; training goes on: %s: %s",
            self._label,
            place,
            type(error).__name__,
            error,
        )


class TensorBoard:
    """Event files, one folder a stage."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, Any] = {}
        self._last_steps: dict[str, int] = {}

    def log(self, metrics: Mapping[str, float], *, step: int, stage: str) -> None:
        """Write one point per metric and flush, so that a killed run keeps them."""
        if step <= self._last_steps.get(stage, 0):
            self._writers.pop(stage).close()
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            # Hides what an earlier writer, in this process or a killed one, wrote from here on.
            self._writers[stage] = SummaryWriter(str(self._folder / stage), purge_step=step)
        writer = self._writers[stage]
        for key, value in metrics.items():
            writer.add_scalar(key, value, global_step=step)
        writer.flush()
        self._last_steps[stage] = step

    def close(self) -> None:
        """End the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
