"""Weight sync over NCCL and parity in bfloat16. Needs two GPUs: one learner, one generator."""

import asyncio

import pytest
import ray
import torch

from past_ray.config.rl import RLConfig
from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.runtime.session import RLSession
from tests.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("weight_transfer", ["object_store", "nccl"])
def test_generator_and_learner_agree_after_a_sync_of_other_weights(tmp_path, weight_transfer):
    folder = make_tiny_model(tmp_path / "a")
    other = make_tiny_model(tmp_path / "b", seed=1)
    runtime = RuntimeConfig(
        use_gpu=True,
        generator=GeneratorConfig(max_model_len=64, weight_transfer=weight_transfer),
    )
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    session = RLSession(
        runtime, RLConfig(kl_coefficient=0.0), model_folder=folder, reward="exact_match"
    )

    async def synced():
        await session.open()
        await session.load_learners(other, reference=None, resume_from=None)
        return await session.sync_weights(0, probe=[[4, 8, 12, 5]])

    try:
        assert asyncio.run(synced()).logprob_gap < 1e-4
    finally:
        session.close()
        ray.shutdown()
