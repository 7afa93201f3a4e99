"""Demand is compared with supply before anything starts."""

import pytest

from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.errors import ConfigError
from past_ray.runtime.placement import (
    check_supply,
    fits_together,
    process_environment,
    rl_bundles,
    rl_demand,
    sft_demand,
)


def small(**changes) -> RuntimeConfig:
    shares = {
        "cpus_per_generator": 0.2,
        "cpus_per_learner": 0.3,
        "cpus_per_rollout_worker": 0.1,
        "cpus_per_sft_worker": 0.25,
    }
    return RuntimeConfig(**{**shares, **changes})


def test_bundles_are_generators_then_learners_then_workers():
    config = small(num_generators=2, num_learners=1, num_rollout_workers=1)
    assert rl_bundles(config) == [{"CPU": 0.2}, {"CPU": 0.2}, {"CPU": 0.3}, {"CPU": 0.1}]


def test_gpus_are_counted_per_learner_and_per_tensor_parallel_rank():
    config = small(
        use_gpu=True,
        num_generators=2,
        num_learners=3,
        num_sft_workers=4,
        generator=GeneratorConfig(tensor_parallel_size=2),
    )
    assert rl_demand(config)["GPU"] == 2 * 2 + 3
    assert sft_demand(config)["GPU"] == 4


def test_sft_demand_keeps_a_whole_cpu_for_the_readers():
    assert sft_demand(small(num_sft_workers=2))["CPU"] == pytest.approx(2 * 0.25 + 1)


@pytest.mark.parametrize(
    ("changes", "stage", "demand"),
    [
        ({"num_generators": 20}, "RL", "4.4 CPUs and 0 GPUs"),
        ({"num_sft_workers": 8}, "SFT", "3 CPUs and 0 GPUs"),
        ({"use_gpu": True}, "RL", "0.6 CPUs and 2 GPUs"),
    ],
)
def test_a_config_that_cannot_fit_is_refused_with_demand_and_supply(changes, stage, demand):
    with pytest.raises(ConfigError) as error:
        check_supply(small(**changes), {"CPU": 2.0, "GPU": 0.0})
    assert f"the {stage} stage" in str(error.value)
    assert demand in str(error.value)
    assert "the cluster has 2 CPUs and 0 GPUs" in str(error.value)


def test_shares_that_add_up_to_the_supply_fit():
    # 20 * 0.1 is more than 2 in binary.
    config = small(num_generators=17, cpus_per_generator=0.1, cpus_per_learner=0.2)
    check_supply(config, {"CPU": 2.0, "GPU": 0.0})


def test_rl_actors_stay_up_only_where_both_stages_fit():
    assert fits_together(small(), {"CPU": 2.1, "GPU": 0.0})
    assert not fits_together(small(), {"CPU": 2.0, "GPU": 0.0})


def test_idle_threads_sleep():
    assert process_environment(small(threads_per_process=3))["OMP_NUM_THREADS"] == "3"
    assert process_environment(small())["OMP_WAIT_POLICY"] == "PASSIVE"
