"""Weight sync past the object store, and sleep: generator and learner agree. Needs GPUs.

None of these has been run: no machine with GPUs was at hand.
"""

import asyncio
from functools import partial

import pytest
import ray
import torch

from past_ray.config.rl import RLConfig
from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.runtime.session import RLSession
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.gpu


def needs_gpus(count):
    return pytest.mark.skipif(
        torch.cuda.device_count() < count, reason=f"needs {count} CUDA devices"
    )


@pytest.mark.parametrize(
    ("colocate", "generator"),
    [
        pytest.param(False, {"weight_transfer": "object_store"}, marks=needs_gpus(2)),
        pytest.param(False, {"weight_transfer": "nccl"}, marks=needs_gpus(2)),
        pytest.param(True, {"weight_transfer": "ipc"}, marks=needs_gpus(1)),
        pytest.param(True, {"sleep_between_steps": True}, marks=needs_gpus(1)),
    ],
)
def test_generator_and_learner_agree_after_a_sync_of_other_weights(tmp_path, colocate, generator):
    folder = make_tiny_model(tmp_path / "a")
    other = make_tiny_model(tmp_path / "b", seed=1)
    runtime = RuntimeConfig(
        use_gpu=True,
        colocate=colocate,
        generator=GeneratorConfig(max_model_len=64, gpu_memory_frac=0.3, **generator),
    )
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    make_env = partial(ClosedBookQA, grade=lambda answer, gold: float(answer == gold))
    session = RLSession(runtime, RLConfig(), model_folder=folder, make_env=make_env)

    async def synced():
        await session.open()
        await session.load_learners(other, reference=None, resume_from=None)
        return await session.sync_weights(0, probe=[[4, 8, 12, 5]])

    try:
        assert asyncio.run(synced()).logprob_gap < 1e-4
    finally:
        session.close()
        ray.shutdown()
