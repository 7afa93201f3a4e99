"""The main rates come out where a cluster's Prometheus reads them."""

import re
import time
import urllib.request

import pytest
import ray

from past_ray.runtime.cluster import own_ray
from past_ray.runtime.ray_metrics import GAUGES, RayMetrics

pytestmark = pytest.mark.ray

DEADLINE_S = 60
"""It takes about 10 s on an idle machine: Ray exports every few seconds."""


def exported():
    """Return the values of our metrics by name and stage, as the node serves them."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    lines = re.findall(r"^ray_(past_ray_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    stage = re.compile(r'stage="(\w+)"')
    return {(name, stage.search(tags)[1]): float(value) for name, tags, value in lines}


def wait_for(names):
    started = time.monotonic()
    found = {}
    while time.monotonic() - started < DEADLINE_S:
        found = exported()
        if names <= found.keys():
            return found
        time.sleep(0.5)
    raise AssertionError(f"no {sorted(names - found.keys())} after {DEADLINE_S} s: {found}")


def test_the_main_rates_are_served_to_prometheus_with_their_stage():
    row = {key: 0.25 * place for place, key in enumerate(GAUGES, start=1)}
    with own_ray(object_store_bytes=100 << 20):
        metrics = RayMetrics()
        metrics.log({**row, "num_rollouts": 64.0}, step=1, stage="rl_source_1")
        metrics.log({**row, "num_rollouts": 8.0}, step=2, stage="rl_source_1")
        metrics.log({"loss": 3.0}, step=7, stage="sft_target")
        expected = {(name, "rl_source_1"): row[key] for key, (name, _) in GAUGES.items()} | {
            ("past_ray_step", "rl_source_1"): 2.0,
            ("past_ray_step", "sft_target"): 7.0,
            ("past_ray_loss", "sft_target"): 3.0,
            ("past_ray_rollouts_total", "rl_source_1"): 72.0,
        }
        found = wait_for(expected.keys())
    assert {key: found[key] for key in expected} == expected
    assert ("past_ray_reward", "sft_target") not in found
