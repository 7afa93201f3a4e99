"""Plan -> GPUs, memory, tokens, judge calls and hours of each stage, printed or refused.

``python -m past_ray.pipelines.paper_plan jobs/configs/paper/plans`` prints every plan of a folder.
The formulas are in ``pipelines/estimates.py``; ``docs/planning.md`` compares them with what others
measured.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from past_ray.config.loading import load_config
from past_ray.config.plan import GPUS, HardwareConfig, ModelShape, PlanConfig
from past_ray.config.plan_stages import StagePlan
from past_ray.errors import ConfigError, PastRayError
from past_ray.pipelines.stage_estimates import StageEstimate, estimate_stage

MAX_GPUS = 64
"""Largest number that a refusal proposes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One recipe with the estimate of each stage."""

    config: PlanConfig
    """The recipe."""

    stages: tuple[StageEstimate, ...]
    """In its order."""

    @property
    def hours(self) -> float:
        """All stages, one after another."""
        return sum(stage.seconds for stage in self.stages) / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours of each stage times its GPUs."""
        return sum(stage.seconds * stage.num_gpus for stage in self.stages) / 3600


def plan(path: Path) -> Plan:
    """Estimate every stage of the plan in a YAML file.

    Raises:
        ConfigError: The file is not a plan, or a stage does not fit into its GPUs' memory. The
            message then names the nearest setting that does.
    """
    config = load_config(PlanConfig, path)
    return Plan(
        config=config,
        stages=tuple(_estimate_or_refuse(stage, config, path) for stage in config.stages),
    )


def print_plans(folder: Path, console: Console) -> None:
    """Print a table for every YAML file of a folder.

    Raises:
        ConfigError: There is none, or one of them is refused.
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise ConfigError(f"{folder} must hold plans as *.yaml, found none. Check the path.")
    for path in paths:
        _print_plan(plan(path), console)


def _estimate_or_refuse(stage: StagePlan, config: PlanConfig, path: Path) -> StageEstimate:
    estimate = estimate_stage(stage, config.model, config.hardware)
    available = GPUS[config.hardware.gpu].memory_bytes
    if estimate.memory_bytes <= available:
        return estimate
    raise ConfigError(
        f"{path}: stage {stage.name} must fit into the {available / 1e9:.0f} GB of one "
        f"{config.hardware.gpu}, needs {estimate.memory_bytes / 1e9:.1f} GB on each of "
        f"{stage.num_gpus}. {_nearest_fit(stage, config.model, config.hardware)}"
    )


def _nearest_fit(stage: StagePlan, shape: ModelShape, hardware: HardwareConfig) -> str:
    """Name the first change that fits: smaller steps, then more GPUs, then larger ones."""
    names = list(GPUS)
    for gpu in names[names.index(hardware.gpu) :]:
        for changes, candidate in _candidates(stage):
            larger = hardware.model_copy(update={"gpu": gpu})
            if estimate_stage(candidate, shape, larger).memory_bytes <= GPUS[gpu].memory_bytes:
                if gpu != hardware.gpu:
                    changes = {"hardware.gpu": gpu, **changes}
                wanted = ", ".join(f"{key}={value}".lower() for key, value in changes.items())
                return f"Nearest that fits: {wanted}."
    return f"Nothing up to {MAX_GPUS} GPUs of the known kinds fits; use a smaller model."


def _candidates(stage: StagePlan) -> Iterator[tuple[dict[str, object], StagePlan]]:
    """Yield valid variants of a stage and what they change, those with the fewest GPUs first."""
    old = stage.model_dump()
    options: dict[str, Sequence[object]] = {"num_gpus": _doublings(stage.num_gpus)}
    if "tensor_parallel" in old:
        options["tensor_parallel"] = _doublings(old["tensor_parallel"])
    if "micro_batch_size" in old:
        options["micro_batch_size"] = list(range(old["micro_batch_size"], 0, -1))
        options["gradient_checkpointing"] = [old["gradient_checkpointing"], True]
    for values in itertools.product(*options.values()):
        new = dict(zip(options, values, strict=True))
        try:
            candidate = type(stage).model_validate({**old, **new})
        except ValidationError:  # a batch that does not divide
            continue
        yield {key: value for key, value in new.items() if value != old[key]}, candidate


def _doublings(start: int) -> list[int]:
    return [start * 2**k for k in range(MAX_GPUS.bit_length()) if start * 2**k <= MAX_GPUS]


def _print_plan(plan: Plan, console: Console) -> None:
    hardware = plan.config.hardware
    table = Table(
        box=SIMPLE, title=f"{plan.config.name}: {plan.config.model.name} on {hardware.gpu}"
    )
    table.add_column("stage", no_wrap=True)
    for column in ("GPUs", "GB per\nGPU", "steps", "tokens\n(M)", "judge\ncalls", "hours"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(
            stage.name,
            str(stage.num_gpus),
            f"{stage.memory_bytes / 1e9:.0f}",
            f"{stage.num_steps:,}" if stage.num_steps else "",
            f"{stage.num_tokens / 1e6:,.1f}",
            f"{stage.judge_calls:,}" if stage.judge_calls else "",
            f"{stage.seconds / 3600:.3f}",
        )
    table.add_section()
    tokens = sum(stage.num_tokens for stage in plan.stages)
    calls = sum(stage.judge_calls for stage in plan.stages)
    table.add_row("all", "", "", "", f"{tokens / 1e6:,.1f}", f"{calls:,}", f"{plan.hours:.3f}")
    console.print(table)
    cost = hardware.usd_per_gpu_hour
    price = f", {plan.gpu_hours * cost:,.0f} USD" if cost is not None else ""
    console.print(f"{plan.gpu_hours:.1f} GPU hours{price}; judge calls are not in the hours.\n")


def _main(arguments: Sequence[str]) -> int:
    console = Console()
    try:
        if len(arguments) != 1:
            raise ConfigError(f"One folder with plans must be given, got {len(arguments)}.")
        print_plans(Path(arguments[0]), console)
    except PastRayError as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
