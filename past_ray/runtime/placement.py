"""Configuration -> placement groups and actor options; every CPU and GPU count is here.

Roles and what one process of each asks for::

    generator       cpus_per_generator       tensor_parallel_size GPUs, or half of one (colocate)
    learner         cpus_per_learner         1 GPU, or the other half
    rollout worker  cpus_per_rollout_worker  no GPU
    SFT worker      cpus_per_sft_worker      1 GPU        (placed by Ray Train)
    table readers   cpus_for_data            no GPU       (left free for Ray Data)

RL and SFT stages take turns. When the cluster holds both at once the RL actors stay up during SFT
stages; otherwise they are ended first (`fits_together`).
"""

import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from past_ray.config.runtime import RuntimeConfig
from past_ray.errors import ClusterError, ConfigError

logger = logging.getLogger(__name__)

Resources = dict[str, float]


def rl_bundles(config: RuntimeConfig) -> list[Resources]:
    """One bundle per actor: generators first, then learners, then rollout workers.

    With ``colocate`` a generator and a learner share a bundle and its GPU.
    """
    workers = [_bundle(config.cpus_per_rollout_worker, 0)] * config.num_rollout_workers
    if config.colocate:
        cpus = config.cpus_per_generator + config.cpus_per_learner
        return [_bundle(cpus, 1)] * config.num_generators + workers
    generator_gpus = config.generator.tensor_parallel_size if config.use_gpu else 0
    learner_gpus = 1 if config.use_gpu else 0
    return (
        [_bundle(config.cpus_per_generator, generator_gpus)] * config.num_generators
        + [_bundle(config.cpus_per_learner, learner_gpus)] * config.num_learners
        + workers
    )


def rl_demand(config: RuntimeConfig) -> Resources:
    """What all RL actors ask for together."""
    return _total(rl_bundles(config))


def sft_demand(config: RuntimeConfig) -> Resources:
    """What an SFT stage asks for, table readers included."""
    worker = _bundle(config.cpus_per_sft_worker, 1 if config.use_gpu else 0)
    return _total([worker] * config.num_sft_workers + [_bundle(config.cpus_for_data, 0)])


def fits_together(config: RuntimeConfig, supply: Resources) -> bool:
    """Whether the RL actors may stay up during an SFT stage."""
    both = _total([rl_demand(config), sft_demand(config)])
    return not _missing(both, supply)


def check_supply(config: RuntimeConfig, supply: Resources) -> None:
    """Refuse a configuration that can never be placed, before anything starts.

    Raises:
        ConfigError: With demand and supply of the stage that does not fit.
    """
    for stage, demand in (("RL", rl_demand(config)), ("SFT", sft_demand(config))):
        if _missing(demand, supply):
            raise ConfigError(
                f"runtime: the {stage} stage must fit the cluster; it asks for {_text(demand)}, "
                f"the cluster has {_text(supply)}. Lower the runtime.num_* counts or the "
                "runtime.cpus_per_* shares (fractions are allowed), or use a larger cluster."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RLPlacement:
    """Reserved bundles and the options of the actors that live in them."""

    config: RuntimeConfig
    """Counts and shares."""

    group: PlacementGroup
    """The reservation; Ray moves its bundles when a node is lost."""

    def generator_options(self, index: int) -> dict[str, Any]:
        """Options of generator ``index``."""
        gpus = self.config.generator.tensor_parallel_size
        return self._options(index, self.config.cpus_per_generator, gpus)

    def learner_options(self, rank: int) -> dict[str, Any]:
        """Options of learner ``rank``."""
        config = self.config
        bundle = rank if config.colocate else config.num_generators + rank
        return self._options(bundle, config.cpus_per_learner, 1)

    def worker_options(self, index: int) -> dict[str, Any]:
        """Options of rollout worker ``index``."""
        config = self.config
        learner_bundles = 0 if config.colocate else config.num_learners
        bundle = config.num_generators + learner_bundles + index
        return self._options(bundle, config.cpus_per_rollout_worker, 0)

    def _options(self, bundle_index: int, num_cpus: float, num_gpus: float) -> dict[str, Any]:
        config = self.config
        share = 0.5 if config.colocate else 1.0
        return {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus * share if config.use_gpu else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=bundle_index
            ),
            "runtime_env": {"env_vars": process_environment(config)},
        }


def place(config: RuntimeConfig) -> RLPlacement:
    """Reserve the bundles of all RL actors before any of them is created.

    Raises:
        ClusterError: If the cluster does not place them within ``placement_timeout_s``.
    """
    group = placement_group(rl_bundles(config), strategy="PACK")
    if not group.wait(config.placement_timeout_s):
        available = {k: ray.available_resources().get(k, 0.0) for k in ("CPU", "GPU")}
        remove_placement_group(group)
        raise ClusterError(
            f"the RL actors must be placed within {config.placement_timeout_s:.0f} s; they ask for "
            f"{_text(rl_demand(config))}, free now are {_text(available)}. Wait for other jobs to "
            "end, lower the demand, or raise runtime.placement_timeout_s."
        )
    logger.info("placed RL actors: %s", _text(rl_demand(config)))
    return RLPlacement(config=config, group=group)


def process_environment(config: RuntimeConfig) -> dict[str, str]:
    """Environment of every process that computes.

    Idle OpenMP threads must sleep: two pools that spin on shared cores slow a step several times.
    """
    return {
        "OMP_NUM_THREADS": str(config.threads_per_process),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _bundle(cpus: float, gpus: float) -> Resources:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _total(parts: list[Resources]) -> Resources:
    return {name: sum(part.get(name, 0.0) for part in parts) for name in ("CPU", "GPU")}


def _missing(demand: Resources, supply: Resources) -> list[str]:
    # Fractions such as 0.1 do not add up exactly in binary.
    return [name for name in demand if demand[name] > supply.get(name, 0.0) + 1e-6]


def _text(resources: Resources) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
