"""Undoes what an engine in the tests' own process leaves behind."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def real_set_num_threads():
    """VLLM on CPU replaces the function by one that does nothing, for every later test too."""
    set_num_threads = torch.set_num_threads
    yield
    torch.set_num_threads = set_num_threads
