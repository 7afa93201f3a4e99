"""kill -9 of random processes of a GRPO run, and proof that nothing was lost.

    python -m benchmarks.chaos               # runs/chaos/report.json

Two runs are disturbed, one synchronous and one with rollouts ahead of the learner; the synchronous
one is compared, weight by weight, with a run that nobody disturbed. After every kill the run must
make progress before the next one, so that each hits a run that works. Processes are killed at
random moments after that: while they sample, train, sync, save or start.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import chaos_run, machine
from past_ray.rl.rollout_table import read_rollouts
from past_ray.runtime.checkpoints import checkpoint_folder
from past_ray.sft.schedule import example_order
from past_ray.skill.checkpoint import load_weights
from past_ray.storage import read_jsonl, write_json

ROLES = {
    "generator": "ray::GeneratorShell",
    "rollout_worker": "ray::RolloutWorkerShell",
    "learner": "ray::LearnerShell",
}
"""Process titles that Ray gives; the driver is our own child."""

POLL_S = 0.05
MAX_DELAY_S = 1.5
"""Longest wait between progress and the next kill: many steps, so all phases are hit."""

STALLED_S = 300.0
"""A run without progress for this long has failed."""


@dataclass
class Disturbed:
    """One run and what was done to it."""

    work_dir: Path
    max_staleness: int
    num_steps: int
    kills: list[dict[str, Any]] = field(default_factory=list)
    driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, or continue, with the same command."""
        command = [sys.executable, "-m", "benchmarks.chaos_run", str(self.work_dir)]
        command += ["--max-staleness", str(self.max_staleness)]
        command += ["--num-steps", str(self.num_steps)]
        log = (self.work_dir / "driver.log").open("ab")
        self.driver = subprocess.Popen(command, stdout=log, stderr=log)

    def progress(self) -> int:
        """Steps in the log, which goes back when learners are lost."""
        rows = read_jsonl(self.work_dir / "rl" / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def pids(self, role: str) -> list[int]:
        """Processes of a role, children of this run's driver alone."""
        assert self.driver is not None
        if role == "driver":
            return [self.driver.pid]
        found = []
        for process in psutil.Process(self.driver.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(ROLES[role]):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def kill(self, role: str, rng: random.Random) -> bool:
        """Kill one process of a role; False when there is none now."""
        assert self.driver is not None
        try:
            pids = self.pids(role)
        except psutil.Error:
            return False
        if not pids:
            return False
        pid = rng.choice(pids)
        step = self.progress()
        try:
            psutil.Process(pid).send_signal(signal.SIGKILL)
        except psutil.Error:
            return False
        self.kills.append({"role": role, "after_step": step, "time": time.time()})
        if role == "driver":
            self.driver.wait()
            self.start()
        return True

    @property
    def is_over(self) -> bool:
        """Whether the driver ended by itself."""
        assert self.driver is not None
        return self.driver.poll() is not None


def disturb(run: Disturbed, *, num_kills: int, rng: random.Random) -> bool:
    """Kill until ``num_kills``, then let the run end; True if it ended well."""
    roles = [*ROLES, "driver"]
    plan = [roles[index % len(roles)] for index in range(num_kills)]
    rng.shuffle(plan)
    run.start()
    for role in plan:
        if not wait_for_progress(run):
            return False
        time.sleep(rng.uniform(0, MAX_DELAY_S))
        while not run.is_over and not run.kill(role, rng):
            time.sleep(POLL_S)
    assert run.driver is not None
    while not run.is_over:
        if not wait_for_progress(run):
            break
    return run.is_over and run.driver.returncode == 0


def wait_for_progress(run: Disturbed) -> bool:
    """Wait until a step is logged that was not there; False if the run stalls or fails."""
    before = run.progress()
    started = time.perf_counter()
    while not run.is_over:
        now = run.progress()
        if now > before:
            return True
        before = min(before, now)
        if time.perf_counter() - started > STALLED_S:
            return False
        time.sleep(POLL_S)
    assert run.driver is not None
    return run.driver.returncode == 0


def books(run: Disturbed) -> dict[str, Any]:
    """Compare the groups that were trained with those that the order of questions demands."""
    rl = chaos_run.rl_config(max_staleness=run.max_staleness, num_steps=run.num_steps)
    order = example_order(
        chaos_run.NUM_QUESTIONS,
        num_steps=rl.num_steps,
        batch_size=rl.prompts_per_step,
        seed=chaos_run.SEED,
    )
    wanted = Counter(f"{step}/q{index}" for step, row in enumerate(order) for index in row)
    trained: Counter[str] = Counter()
    incomplete = 0
    for step in range(rl.num_steps):
        for group in read_rollouts(run.work_dir / "rl", step + 1):
            ids = {rollout.rollout_id for rollout in group.rollouts}
            incomplete += len(ids) != rl.group_size
            trained[next(iter(ids)).rsplit("/", 1)[0]] += 1
    rows = read_jsonl(run.work_dir / "rl" / "metrics.jsonl")
    return {
        "groups_wanted": wanted.total(),
        "groups_lost": (wanted - trained).total(),
        "groups_trained_twice": (trained - wanted).total(),
        "groups_incomplete": incomplete,
        "steps_logged_once": [row["step"] for row in rows] == list(range(1, rl.num_steps + 1)),
        "staleness_max": max(row["staleness_max"] for row in rows),
        "discarded_rollouts": rows[-1]["discarded_rollouts"],
    }


def equal_weights(left: Path, right: Path) -> bool:
    """Whether two checkpoints hold the same bits."""
    first, second = load_weights(left), load_weights(right)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def main() -> None:
    """Run all and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24, help="kills of each disturbed run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    rng = random.Random(args.seed)
    report: dict[str, Any] = {"machine": machine.describe(), "runs": {}}

    def prepared(name: str, max_staleness: int) -> Disturbed:
        work_dir = args.out / name
        work_dir.mkdir(parents=True)
        return Disturbed(work_dir=work_dir, max_staleness=max_staleness, num_steps=args.steps)

    undisturbed = prepared("undisturbed", 0)
    started = time.perf_counter()
    if not disturb(undisturbed, num_kills=0, rng=rng):
        raise SystemExit(f"the undisturbed run failed: see {undisturbed.work_dir}/driver.log")
    report["undisturbed_seconds"] = time.perf_counter() - started
    for name, max_staleness in (("synchronous", 0), ("asynchronous", 1)):
        run = prepared(name, max_staleness)
        started = time.perf_counter()
        is_finished = disturb(run, num_kills=args.kills, rng=rng)
        result: dict[str, Any] = {
            "finished": is_finished,
            "seconds": time.perf_counter() - started,
            "kills": len(run.kills),
            "kills_by_role": dict(Counter(kill["role"] for kill in run.kills)),
            "kill_log": run.kills,
        }
        if is_finished:
            result |= books(run)
        report["runs"][name] = result
        print(json.dumps({name: {k: v for k, v in result.items() if k != "kill_log"}}, indent=2))
    synchronous = report["runs"]["synchronous"]
    if synchronous["finished"]:
        synchronous["final_weights_equal_to_undisturbed"] = equal_weights(
            *(
                checkpoint_folder(args.out / name / "rl", args.steps)
                for name in ("synchronous", "undisturbed")
            )
        )
    runs = report["runs"].values()
    summary = {
        "kills": sum(run["kills"] for run in runs),
        "finished": all(run["finished"] for run in runs),
        "groups_lost": sum(run.get("groups_lost", 0) for run in runs),
        "groups_trained_twice": sum(run.get("groups_trained_twice", 0) for run in runs),
        "final_weights_equal_to_undisturbed": synchronous.get("final_weights_equal_to_undisturbed"),
    }
    write_json(args.out / "report.json", {**summary, **report})
    print(json.dumps(summary, indent=2))
    if not (
        summary["finished"]
        and summary["groups_lost"] == 0
        and summary["groups_trained_twice"] == 0
        and summary["final_weights_equal_to_undisturbed"]
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
