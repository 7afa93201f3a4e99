"""A Ray of the tests' own, and what undoes an engine in the tests' own process."""

import pytest
import ray
import torch


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        _temp_dir="/tmp/r_tests",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def real_set_num_threads():
    """VLLM on CPU replaces the function by one that does nothing, for every later test too."""
    set_num_threads = torch.set_num_threads
    yield
    torch.set_num_threads = set_num_threads
