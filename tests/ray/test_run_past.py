"""The whole method in its short form: real engines, killed and continued, and as a Ray job."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "jobs" / "configs" / "smoke.yaml"
FIGURES = ("arms", "scale_sweep", "dose_curve", "cosines", "cosine_modules", "answers")

pytestmark = pytest.mark.ray


def command(run_dir: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "jobs.run_past",
        "--config",
        str(SMOKE),
        f"run_dir={run_dir}",
        *overrides,
    ]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "PAST_RAY_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(
        command(run_dir), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def figures(run_dir: Path) -> dict:
    report = json.loads((run_dir / "report.json").read_text())
    arms = {
        name: {key: value for key, value in arm.items() if not key.startswith("seconds")}
        for name, arm in report["arms"].items()
    }
    rl = {
        stage: [(row["step"], row["reward"], row.get("loss")) for row in rows]
        for stage, rows in report["training"]["rl"].items()
    }
    return {
        **{key: report[key] for key in FIGURES},
        "arms": arms,
        "rl": rl,
        "sft": report["training"]["sft"],
    }


def test_the_report_has_every_figure(uninterrupted):
    report = json.loads((uninterrupted / "report.json").read_text())
    assert set(report["arms"]) == {
        "base",
        "target_sft",
        "past",
        "past_two_rounds",
        "sequential",
        "pre_injection",
        "target_rl",
    }
    for arm in report["arms"].values():
        assert {"accuracy", "ci95", "answer_tokens", "seconds"} <= set(arm)
    assert set(report["cosines"]) == {
        "sft_source__rl_source",
        "sft_target__rl_source",
        "sft_source__sft_target",
        "rl__rl",
    }
    assert report["weight_sync"]["max_logprob_gap"] < 1e-4
    assert {"stage_seconds", "seed", "versions"} <= set(report)
    assert (
        "<img" in (uninterrupted / "report.html").read_text()
        or "<svg" in (uninterrupted / "report.html").read_text()
    )


def test_scale_zero_is_the_target_sft_and_one_is_past(uninterrupted):
    report = json.loads((uninterrupted / "report.json").read_text())
    sweep = {point["scale"]: point["accuracy"] for point in report["scale_sweep"]}
    assert sweep[0.0] == report["arms"]["target_sft"]["accuracy"]
    assert sweep[1.0] == report["arms"]["past"]["accuracy"]


def test_a_run_killed_in_sft_and_in_rl_ends_with_the_same_figures(
    uninterrupted, environment, tmp_path
):
    run_dir = tmp_path / "run"
    for wait_for in ("work/sft_target/metrics.jsonl", "work/rl_source_1/step-000001"):
        process = subprocess.Popen(
            command(run_dir), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while not (run_dir / wait_for).exists():
            assert process.poll() is None, f"ended before {wait_for} was there"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run_dir / "report.json").exists()
    subprocess.run(command(run_dir), cwd=ROOT, env=environment, check=True, timeout=500)
    assert figures(run_dir) == figures(uninterrupted)


def test_a_config_that_cannot_fit_is_refused_before_ray_starts(environment, tmp_path):
    started = time.monotonic()
    done = subprocess.run(
        command(tmp_path / "run", "runtime.num_generators=1000"),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "ConfigError: runtime: the RL stage must fit the cluster" in done.stderr
    assert "started Ray" not in done.stderr
    assert time.monotonic() - started < 100


def test_ray_job_submit_runs_the_same_on_a_running_cluster(uninterrupted, environment, tmp_path):
    """Starts a cluster with a dashboard, submits the working directory, ends that cluster only."""
    script = ROOT / "tests" / "ray" / "submit_job.py"
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(script), str(run_dir), environment["PAST_RAY_CACHE"]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert figures(run_dir) == figures(uninterrupted)
