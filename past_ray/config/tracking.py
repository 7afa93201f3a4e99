"""Where the metrics of a run go besides its own files."""

from past_ray.config.base import StrictConfig


class TrackingConfig(StrictConfig):
    """Services that get every step's metrics; TensorBoard files are always written."""

    wandb_project: str | None = None
    """Project at Weights & Biases; None sends nothing. Needs the package ``wandb``; without an API
    key the run is recorded offline below the run directory."""

    mlflow_uri: str | None = None
    """MLflow's server or database, e.g. ``http://mlflow:5000`` or ``sqlite:///mlflow.db``; None
    sends nothing. Needs the package ``mlflow``."""
