"""Tracking services that can only append: Weights & Biases and MLflow.

Their packages are optional and imported when a service is opened.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from past_ray.storage import write_json


class Service(Protocol):
    """A tracking service that can only append."""

    def open(self, run_id: str | None) -> str:
        """Begin a run, or go on with one; return its id."""
        ...

    def log(self, metrics: Mapping[str, float], *, step: int, stage: str) -> None:
        """Append the metrics of one step."""
        ...

    def close(self) -> None:
        """Write what is buffered."""
        ...


class AppendOnly:
    """Sends each step once to a service, also when a continued run repeats steps."""

    def __init__(self, service: Service, record: Path) -> None:
        """Open the service.

        Args:
            service: Gets the steps.
            record: JSON file that remembers the service's run and its last steps.
        """
        self._service = service
        self._record = record
        known = json.loads(record.read_text()) if record.exists() else {}
        self._last_steps: dict[str, int] = known.get("last_steps", {})
        self._run_id = service.open(known.get("run_id"))

    def log(self, metrics: Mapping[str, float], *, step: int, stage: str) -> None:
        """Send a step that the service does not have."""
        if step <= self._last_steps.get(stage, 0):
            return
        self._service.log(metrics, step=step, stage=stage)
        self._last_steps[stage] = step
        write_json(self._record, {"run_id": self._run_id, "last_steps": self._last_steps})

    def close(self) -> None:
        """Close the service."""
        self._service.close()


class WandbService:
    """Weights & Biases; offline without an API key, for ``wandb sync`` to send later."""

    def __init__(self, project: str, run_dir: Path, *, name: str) -> None:
        self._project = project
        self._run_dir = run_dir
        self._name = name
        self._run: Any = None
        self._stages: set[str] = set()

    def open(self, run_id: str | None) -> str:
        """Begin or go on; never asks for a key."""
        import wandb  # pyright: ignore[reportMissingImports]

        mode = None if wandb.setup().settings.api_key else "offline"
        self._run = wandb.init(
            project=self._project,
            name=self._name,
            dir=str(self._run_dir),
            id=run_id,
            resume="allow",
            mode=mode,
        )
        return str(self._run.id)

    def log(self, metrics: Mapping[str, float], *, step: int, stage: str) -> None:
        """Log under the stage's own step axis: the service's must never go back."""
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        values = {f"{stage}/{key}": value for key, value in metrics.items()}
        self._run.log({**values, f"{stage}/step": step})

    def close(self) -> None:
        """Upload the rest."""
        self._run.finish()


class MLflowService:
    """An MLflow server or database."""

    def __init__(self, uri: str, *, name: str) -> None:
        self._uri = uri
        self._name = name
        self._client: Any = None
        self._run_id = ""

    def open(self, run_id: str | None) -> str:
        """Begin a run in the experiment ``name``, or go on with one."""
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client = MlflowClient(tracking_uri=self._uri)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
            return run_id
        experiment = self._client.get_experiment_by_name(self._name)
        experiment_id = (
            self._client.create_experiment(self._name)
            if experiment is None
            else experiment.experiment_id
        )
        self._run_id = str(self._client.create_run(experiment_id).info.run_id)
        return self._run_id

    def log(self, metrics: Mapping[str, float], *, step: int, stage: str) -> None:
        """Send all metrics of a step in one request."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now_ms = int(time.time() * 1000)
        values = [Metric(f"{stage}/{key}", value, now_ms, step) for key, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=values)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)
