"""Options of ``past-ray skill`` and what their texts mean. Heavy imports follow the parsing."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from past_ray.errors import ConfigError

Out = Annotated[str, typer.Option("--out", "-o", help="Folder of the result.")]
SkillArgument = Annotated[str, typer.Argument(help="Folder of a skill vector.")]
Workers = Annotated[
    int | None, typer.Option(help="Threads; by default one for each CPU.", show_default=False)
]
ChunkMib = Annotated[int, typer.Option(help="MiB of float32 that a thread holds per tensor.")]
ShardGb = Annotated[float, typer.Option(help="Largest file of weights, in GB.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster that does the shards, e.g. auto; by default this process.",
        show_default=False,
    ),
]
Scales = Annotated[
    Path | None,
    typer.Option(help="YAML with scales by layer and module; see docs/skill-format.md."),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by default the target's.")
]
RoundingSeed = Annotated[
    int | None,
    typer.Option("--stochastic", help="Round at random, unbiased, from this seed.", metavar="SEED"),
]
OtherBase = Annotated[
    bool, typer.Option(help="Accept a target that did not grow from the vector's base.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Hash all that is read, as `skill verify` does.")
]


def strength(scale: float | None, scales: Path | None) -> Any:  # noqa: ANN401 - a number or a config
    """Return the scale, or the scales of a YAML file with ``--scale`` put into it."""
    from past_ray.config.loading import load_config
    from past_ray.config.skill import ScaleConfig

    if scales is None:
        return 1.0 if scale is None else scale
    return load_config(ScaleConfig, scales, [] if scale is None else [f"scale={scale}"])


def rounding(dtype: str | None, seed: int | None) -> Any:  # noqa: ANN401 - imported late
    """Return how sums are rounded."""
    from past_ray.skill import Rounding

    if dtype is not None:
        one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    return Rounding(dtype=dtype, seed=seed)  # type: ignore[arg-type]


def merge_rule(method: str, **options: float | None) -> Any:  # noqa: ANN401 - imported late
    """Refuse an option that the method would ignore."""
    from past_ray.skill import MergeRule

    one_of("--method", method, ("linear", "ties", "dare"))
    given = {name: value for name, value in options.items() if value is not None}
    used = {"linear": set[str](), "ties": {"density"}, "dare": {"drop_rate", "seed"}}[method]
    if unused := sorted(given.keys() - used):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ConfigError(
            f"--method {method} does not use {names}. Leave it out, or choose the method that does."
        )
    return MergeRule(method=method, **given)  # type: ignore[arg-type]


def places(targets: list[str], out: str) -> dict[str, str]:
    """Where each target's result goes."""
    if len(targets) == 1:
        return {targets[0]: out}
    names = [target.rstrip("/").rpartition("/")[2] for target in targets]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"targets of one run must have different folder names, got {', '.join(names)}."
            " Inject them one by one."
        )
    return {target: f"{out}/{name}" for target, name in zip(targets, names, strict=True)}


def numbers(option: str, text: str) -> list[float]:
    """Return the numbers of a text such as ``0,0.5,1``."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} must be numbers such as 0,0.5,1, got {text!r}.") from error


def at_least(option: str, value: float, least: float) -> float:
    """Return a number if it is finite and large enough."""
    if not least <= value < math.inf:
        raise ConfigError(f"{option} must be at least {least:g}, got {value:g}.")
    return value


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:  # noqa: ANN401 - a literal
    """Return a word if it is allowed."""
    if value not in allowed:
        raise ConfigError(f"{option} must be one of {', '.join(allowed)}, got {value!r}.")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        found = " ".join(str(error).split())
        raise ConfigError(f"{path} must be a readable YAML file: {found}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping, found {type(values).__name__}.")
    return {str(key): value for key, value in values.items()}


def hash_files(paths: list[Path]) -> str:
    """Return the hash of source data."""
    from past_ray.skill.manifest import hash_files

    return hash_files(paths)
