"""Run, or continue, a whole PaST experiment: ``python -m jobs.run_past --config FILE [key=value]``.

Exit codes: 0 finished, 1 refused or failed with a message, 130 interrupted (the same command
continues).
"""

from pathlib import Path
from typing import Annotated

import typer

from past_ray.cli.app import Overrides, Seeds, run_experiment


def main(
    config: Annotated[Path, typer.Option(help="YAML file, e.g. jobs/configs/demo.yaml.")],
    overrides: Overrides = None,
    seeds: Seeds = "",
) -> None:
    """Run, or continue, a whole experiment: SFT, RL, skill vector, injection, all arms."""
    run_experiment(config, overrides, seeds, ask=0)


if __name__ == "__main__":
    typer.run(main)
