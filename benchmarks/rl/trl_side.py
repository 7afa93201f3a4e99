"""TRL's GRPOTrainer in every CPU setting that might be its fastest."""

import json
import os
import re
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.rl.workload import Workload

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-bench-rl" / "bin" / "python"
TIMEOUT_S = 120
WARM_UP = 1
"""Steps that are not counted; TRL's own times are steady from the second on."""

SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (1, {}),
    "bf16": (1, {"bf16": True}),
    "fp32, 2 ranks": (2, {}),
    "bf16, 2 ranks": (2, {"bf16": True}),
    "bf16, 2 ranks, 2 micro-batches": (2, {"bf16": True, "micro_batches": 2}),
    "bf16, 2 ranks, 4 micro-batches": (2, {"bf16": True, "micro_batches": 4}),
    "fp32, 2 ranks, static cache": (2, {"cache_implementation": "static"}),
    "bf16, 2 ranks, plain DDP": (2, {"bf16": True, "ddp_find_unused_parameters": False}),
    "fp32, continuous batching": (1, {"use_transformers_continuous_batching": True}),
    "vLLM colocated": (1, {"use_vllm": True, "vllm_mode": "colocate"}),
}
"""Ranks and settings. Ranks share the two cores by one thread each, one rank takes both. bf16 is
autocast over fp32 masters; a static cache does not run with it. TRL's vLLM server mode is missing:
it pushes weights over NCCL. So is torch.compile: a minute of compiling, and no faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TRLRun:
    """One run of one setting."""

    tokens_per_s: list[float]
    """Completion tokens over the wall seconds of each step after the warm-up."""

    mean_length: float
    """Tokens of a completion."""

    threads: int
    """torch threads of each rank."""

    @property
    def median(self) -> float:
        """Median of the steps."""
        return statistics.median(self.tokens_per_s)


class TRLError(RuntimeError):
    """A setting does not run on this machine."""


def run_trl(name: str, workload: Workload, *, model: Path, work: Path, num_steps: int) -> TRLRun:
    """Run a setting in processes of its own.

    Raises:
        TRLError: With the last error line of its log.
    """
    ranks, settings = SETTINGS[name]
    stem = work / re.sub(r"\W+", "-", f"trl-{name}")
    job = stem.with_suffix(".json")
    fields = {"model": str(model), "workload": asdict(workload), "out": f"{stem}.out"}
    fields |= {"num_steps": num_steps, "threads": os.cpu_count(), "settings": settings}
    job.write_text(json.dumps(fields))
    module = ["benchmarks.rl.trl_run", str(job)]
    if ranks > 1:
        module[:0] = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    with stem.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [str(PYTHON), "-W", "ignore", "-m", *module],
            cwd=ROOT,
            env=_environment(ranks),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, 9)
            process.wait()
            raise TRLError(f"not done after {TIMEOUT_S} s") from error
    if code != 0:
        raise TRLError(_last_error(stem.with_suffix(".log").read_text()))
    return _read([json.loads(Path(f"{stem}.out.{rank}").read_text()) for rank in range(ranks)])


def try_all(workload: Workload, *, model: Path, work: Path, num_steps: int) -> dict[str, Any]:
    """Run every setting once; return its figures or why it does not run."""
    tried: dict[str, Any] = {}
    for name in SETTINGS:
        try:
            run = run_trl(name, workload, model=model, work=work, num_steps=num_steps)
        except TRLError as error:
            tried[name] = {"failed": str(error)}
        else:
            tried[name] = asdict(run) | {"median_tokens_per_s": run.median}
        print(f"  TRL, {name}: {tried[name].get('median_tokens_per_s', tried[name])}")
    return tried


def fastest(tried: dict[str, Any]) -> str:
    """Return the name of the fastest setting that ran."""
    ran = {name: run["median_tokens_per_s"] for name, run in tried.items() if "failed" not in run}
    return max(ran, key=lambda name: ran[name])


def _environment(ranks: int) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str((os.cpu_count() or 1) // ranks),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # TRL reaches into the engine, so it has to be in its process. Ours must not be its plug-in.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "none",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def _read(ranks: list[dict[str, Any]]) -> TRLRun:
    """Put the ranks' reports together; a step's time is that of rank 0."""
    if not all(rank["is_finite"] and rank["dtypes"] == ["torch.float32"] for rank in ranks):
        raise TRLError("weights are not finite, or no longer fp32")
    lengths = [
        [length for rank in ranks for length in rank["lengths"][step]]
        for step in range(len(ranks[0]["seconds"]))
    ]
    rates = [sum(n) / s for n, s in zip(lengths, ranks[0]["seconds"], strict=True)]
    every = [length for step in lengths for length in step]
    return TRLRun(
        tokens_per_s=rates[WARM_UP:],
        mean_length=statistics.mean(every),
        threads=ranks[0]["threads"],
    )


def _last_error(log: str) -> str:
    errors = re.findall(r"^(?:\[rank\d\]: *)?(\w*(?:Error|Exception)\b.*)$", log, re.MULTILINE)
    real = [line for line in errors if "ChildFailedError" not in line]
    return (real or ["it ended without an error line"])[-1][:300]
