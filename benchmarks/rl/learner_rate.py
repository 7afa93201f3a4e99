"""Useful operations per second of a learner's step, against matrix products in the same process."""

import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from past_ray.config.algorithm import KLConfig
from past_ray.config.rl import RLConfig
from past_ray.engine.flops import DecoderShape, decoder_shape, step_flops
from past_ray.engine.learner import GRPOLearner
from past_ray.rl.objective import count_totals
from past_ray.rl.types import TrainSample

MATMUL_REPEATS = 7


def measure_learner(
    model: Path, *, num_samples: int, num_prompt: int, num_completion: int, num_steps: int
) -> dict[str, Any]:
    """Return both rates in fp32 and their ratio; the first step is the warm-up.

    Args:
        model: Hugging Face folder.
        num_samples: Samples of a step.
        num_prompt: Tokens of each that do not train.
        num_completion: Tokens of each that do.
        num_steps: Counted steps.
    """
    shape = decoder_shape(AutoConfig.from_pretrained(model))
    samples = _samples(num_samples, num_prompt, num_completion, vocab_size=shape.vocab_size)
    learner = GRPOLearner(RLConfig(kl=KLConfig(coefficient=0.0)), device="cpu")
    learner.load(model, reference=None, resume_from=None)
    totals = count_totals(samples, rollout_token_limit=num_completion)
    seconds: list[float] = []
    for _ in range(num_steps + 1):
        started = time.perf_counter()
        learner.train_step(samples, totals=totals)
        seconds.append(time.perf_counter() - started)
    flops = step_flops(
        shape,
        lengths=[len(sample.token_ids) for sample in samples],
        num_loss_tokens=totals.num_loss_tokens,
    )
    rate = flops / statistics.median(seconds[1:])
    products = matmul_rates(shape, rows=num_samples * (num_prompt + num_completion))
    best = max(products, key=lambda name: products[name])
    return {
        "learner_flops_fraction": rate / products[best],
        "learner_gflops_per_s": rate / 1e9,
        "matmul_gflops_per_s": {name: value / 1e9 for name, value in products.items()},
        "matmul_taken": best,
        "step_flops": flops,
        "step_seconds": seconds,
        "samples": [num_samples, num_prompt, num_completion],
        "threads": torch.get_num_threads(),
    }


def matmul_rates(shape: DecoderShape, *, rows: int) -> dict[str, float]:
    """Return operations per second of the model's own products, and of a square one."""
    width, inner = shape.hidden_size, shape.intermediate_size
    sizes = {
        "square 1024": (1024, 1024, 1024),
        "rows x hidden x intermediate": (rows, width, inner),
        "rows x intermediate x hidden": (rows, inner, width),
        "hidden x rows x intermediate": (width, rows, inner),
    }
    return {name: _matmul_rate(*size) for name, size in sizes.items()}


def _matmul_rate(m: int, k: int, n: int) -> float:
    """Return the rate of the fastest of a few products ``[m, k] @ [k, n]``."""
    left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    seconds: list[float] = []
    for _ in range(MATMUL_REPEATS):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    return 2 * m * k * n / min(seconds)


def _samples(count: int, num_prompt: int, num_completion: int, *, vocab_size: int) -> list[Any]:
    rng = random.Random(0)
    size = num_prompt + num_completion
    return [
        TrainSample(
            token_ids=[rng.randrange(vocab_size) for _ in range(size)],
            loss_mask=[False] * num_prompt + [True] * num_completion,
            generator_logprobs=[0.0] * num_prompt + [-8.0] * num_completion,
            advantages=[0.0] * num_prompt + [rng.gauss(0, 1)] * num_completion,
        )
        for _ in range(count)
    ]
