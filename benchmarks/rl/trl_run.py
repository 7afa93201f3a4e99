"""One run of TRL's GRPOTrainer; runs in ``.venv-bench-rl``, one process or a few under torchrun.

    python -m benchmarks.rl.trl_run JOB.json

The job names the model folder, the workload and the settings; each rank writes ``OUT.rank``.
"""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.rl.workload import Workload, hashed_reward, questions


class Recorder(TrainerCallback):
    """Notes when each optimizer step ended, and how many tokens were sampled for it."""

    def __init__(self) -> None:
        self.ended: list[float] = []
        self.completions: list[list[int]] = []
        self.new: list[int] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Start the first step's clock."""
        self.ended.append(time.perf_counter())

    def on_step_end(self, *_: object, **__: object) -> None:
        """End a step."""
        self.ended.append(time.perf_counter())
        self.completions.append(self.new)
        self.new = []

    def reward(
        self,
        completions: list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        **_: object,
    ) -> list[float]:
        """Count the tokens and grade the texts."""
        self.new = self.new + [len(ids) for ids in completion_ids]
        return [hashed_reward(completion[0]["content"]) for completion in completions]


def grpo_config(job: dict[str, Any], workload: Workload, ranks: int) -> GRPOConfig:
    """Return the settings: what the workload fixes, what costs nothing, and what the job varies."""
    settings = dict(job["settings"])
    micro_batches = settings.pop("micro_batches", 1)
    return GRPOConfig(
        output_dir=job["out"] + ".trainer",
        max_steps=job["num_steps"],
        per_device_train_batch_size=workload.rollouts_per_step // ranks // micro_batches,
        gradient_accumulation_steps=micro_batches,
        num_generations=workload.group_size,
        max_completion_length=workload.completion_tokens,
        learning_rate=workload.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        temperature=1.0,
        beta=0.0,
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
        **{"bf16": False, "gradient_checkpointing": False, **settings},
    )


def main() -> None:
    """Train and write times and lengths."""
    job = json.loads(Path(sys.argv[1]).read_text())
    workload = Workload(**job["workload"])
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    threads = job["threads"] // ranks
    torch.set_num_threads(threads)
    recorder = Recorder()
    trainer = GRPOTrainer(
        model=job["model"],
        reward_funcs=recorder.reward,
        args=grpo_config(job, workload, ranks),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": text}]} for text in questions(workload)]
        ),
        callbacks=[recorder],
    )
    # vLLM binds the process to cores and sets threads of its own.
    torch.set_num_threads(threads)
    trainer.train()
    ended = recorder.ended
    report = {
        "seconds": [after - before for before, after in pairwise(ended)],
        "lengths": recorder.completions,
        "threads": torch.get_num_threads(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "dtypes": sorted({str(p.dtype) for p in trainer.model.parameters()}),
        "is_finite": all(bool(p.isfinite().all()) for p in trainer.model.parameters()),
    }
    Path(f"{job['out']}.{rank}").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
