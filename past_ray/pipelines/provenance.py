"""What a run was asked to do and with what: written into the run directory before anything runs."""

from pathlib import Path
from typing import Any, cast

import yaml

from past_ray.build_info import git_commit, versions
from past_ray.config.experiment import ExperimentConfig
from past_ray.config.loading import config_hash, dump_config
from past_ray.errors import ConfigError
from past_ray.storage import write_json, write_text

PLACEMENT_KEYS = ("run_dir", "runtime", "serving", "tracking")
"""Sections that may differ when a run is continued: they say where it runs, not what it computes.
"""


def open_run(config: ExperimentConfig) -> None:
    """Write the resolved config and its provenance, or check those of the run to continue.

    Raises:
        ConfigError: If ``run_dir`` holds a run of another configuration.
    """
    path = config.run_dir / "config.yaml"
    resolved = dump_config(config)
    if path.exists():
        _check_same(yaml.safe_load(path.read_text()), yaml.safe_load(resolved), config.run_dir)
    elif config.run_dir.exists() and any(config.run_dir.iterdir()):
        raise ConfigError(
            f"run_dir must be new or hold an earlier run; {config.run_dir} has files but no "
            "config.yaml. Choose another run_dir."
        )
    write_text(path, resolved)
    provenance = {
        "config_hash": config_hash(config, exclude=PLACEMENT_KEYS),
        "seed": config.seed,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_json(config.run_dir / "provenance.json", provenance)


def _check_same(before: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    differing = [
        f"{key}: {old!r} -> {new!r}"
        for key, old, new in _differences(before, now, "")
        if key.split(".")[0] not in PLACEMENT_KEYS
    ]
    if differing:
        raise ConfigError(
            f"run_dir must hold a run of the same configuration; {run_dir} differs in "
            f"{len(differing)} keys: {'; '.join(differing[:5])}. Choose another run_dir, or "
            "delete that folder to start over."
        )


def _differences(before: object, now: object, path: str) -> list[tuple[str, object, object]]:
    if isinstance(before, dict) and isinstance(now, dict):
        before, now = cast("dict[str, object]", before), cast("dict[str, object]", now)
        keys = [*before, *(key for key in now if key not in before)]
        return [
            difference
            for key in keys
            for difference in _differences(
                before.get(key), now.get(key), f"{path}.{key}" if path else str(key)
            )
        ]
    return [] if before == now else [(path, before, now)]
