"""The same experiment under several seeds, and the means of its figures."""

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from past_ray.config.experiment import ExperimentConfig
from past_ray.errors import ConfigError
from past_ray.pipelines.past import run_past
from past_ray.pipelines.report import write_report

AVERAGED = (
    "accuracy",
    "answer_tokens",
    "seconds",
    "seconds_per_new_target",
    "truncated_frac",
)
"""Figures of an arm that are averaged over seeds."""


def parse_seeds(text: str) -> list[int]:
    """Read ``0,1,2``.

    Raises:
        ConfigError: If it is not a list of different whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--seeds must be different whole numbers such as 0,1,2, got {text!r}.")
    return [int(part) for part in parts]


def run_seeds(config: ExperimentConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Run ``config`` once per seed under ``run_dir/seed-<n>`` and write the joint report.

    Finished seeds are read back, an unfinished one continues.
    """
    reports: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        run_dir = config.run_dir / f"seed-{seed}"
        finished = run_dir / "report.json"
        reports[seed] = (
            json.loads(finished.read_text())
            if finished.exists()
            else run_past(config.model_copy(update={"seed": seed, "run_dir": run_dir}))
        )
    report = mean_report(config.name, reports)
    write_report(report, config.run_dir)
    return report


def mean_report(name: str, reports: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Average the arms and cosines of several reports; ``ci95`` is the range over seeds."""
    runs = list(reports.values())
    return {
        "name": name,
        "seeds": list(reports),
        "versions": runs[0]["versions"],
        "git_commit": runs[0]["git_commit"],
        "ci95_of": "smallest and largest accuracy over the seeds",
        "arms": {arm: _mean_arm([run["arms"][arm] for run in runs]) for arm in runs[0]["arms"]},
        "cosines": {
            pair: fmean(run["cosines"][pair] for run in runs) for pair in runs[0]["cosines"]
        },
        "per_seed": {
            str(seed): {key: run[key] for key in ("arms", "cosines", "weight_sync", "scale_sweep")}
            for seed, run in reports.items()
        },
    }


def _mean_arm(arms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [arm["accuracy"] for arm in arms]
    means = {key: fmean(arm[key] for arm in arms) for key in AVERAGED}
    return {**means, "ci95": [min(accuracies), max(accuracies)]}
