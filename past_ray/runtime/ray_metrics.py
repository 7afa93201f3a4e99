"""The main rates of a run as Ray metrics, which every node serves to Prometheus.

Ray puts ``ray_`` before each name: ``past_ray_reward`` is read as ``ray_past_ray_reward``. All have
the tag ``stage``. ``clusters/README.md`` says where a cluster's Prometheus finds them.
"""

from collections.abc import Mapping
from functools import cached_property

from ray.util.metrics import Counter, Gauge

GAUGES = {
    "reward": ("past_ray_reward", "Mean reward of the last step's completed rollouts."),
    "loss": ("past_ray_loss", "Loss of the last step."),
    "seconds": ("past_ray_step_seconds", "Duration of the last step."),
    "tokens_per_s": ("past_ray_tokens_per_s", "Sampled, or in SFT trained, tokens per second."),
    "generator_idle_frac": (
        "past_ray_generator_idle_frac",
        "Share of the last step in which generators had nothing to decode.",
    ),
    "learner_idle_frac": (
        "past_ray_learner_idle_frac",
        "Share of the last step in which no gradient was computed.",
    ),
    "staleness_mean": (
        "past_ray_staleness",
        "Mean age of the last step's rollouts, in optimizer steps.",
    ),
    "error_frac": ("past_ray_rollout_error_frac", "Share of the last step's rollouts that failed."),
    "restarts": ("past_ray_restarts", "Processes that were replaced so far."),
}
"""Name and description by the key of ``metrics.jsonl``; a step's row may lack some."""


class RayMetrics:
    """Implements ``pipelines.tracking.Tracker``; needs a Ray that is running."""

    def log(self, metrics: Mapping[str, float], *, step: int, stage: str) -> None:
        """Show the metrics of a step until the next one's arrive."""
        tags = {"stage": stage}
        for key, gauge in self._gauges.items():
            if key in metrics:
                gauge.set(metrics[key], tags=tags)
        self._step.set(step, tags=tags)
        num_rollouts = metrics.get("num_rollouts", 0.0)
        if num_rollouts > 0:
            self._rollouts.inc(num_rollouts, tags=tags)

    def close(self) -> None:
        """Nothing is open: the values end with the process."""

    @cached_property
    def _gauges(self) -> dict[str, Gauge]:
        return {
            key: Gauge(name, description=description, tag_keys=("stage",))
            for key, (name, description) in GAUGES.items()
        }

    @cached_property
    def _step(self) -> Gauge:
        return Gauge("past_ray_step", description="Steps done.", tag_keys=("stage",))

    @cached_property
    def _rollouts(self) -> Counter:
        return Counter(
            "past_ray_rollouts", description="Rollouts sampled so far.", tag_keys=("stage",)
        )
