"""Metrics reach every tracker once, and none of them can stop a run."""

import importlib.util
import json
import logging
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from past_ray.config.tracking import TrackingConfig
from past_ray.errors import ConfigError
from past_ray.pipelines.tracking import (
    Guarded,
    TensorBoard,
    Trackers,
    check_tracking,
    open_trackers,
)
from past_ray.pipelines.tracking_services import AppendOnly, MLflowService, WandbService

STAGE = "rl_source_1"


class Remembering:
    """A tracker and a service that keep what they are given."""

    def __init__(self):
        self.logged, self.opened, self.is_closed = [], [], False

    def open(self, run_id):
        self.opened.append(run_id)
        return "run-7"

    def log(self, metrics, *, step, stage):
        self.logged.append((stage, step, dict(metrics)))

    def close(self):
        self.is_closed = True


class Breaking(Remembering):
    def log(self, metrics, *, step, stage):
        super().log(metrics, step=step, stage=stage)
        if step >= 2:
            raise ConnectionError("server is gone")

    def close(self):
        raise ConnectionError("server is gone")


def points(folder, key="reward"):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def log_steps(tracker, steps, *, value=lambda step: float(step)):
    for step in steps:
        tracker.log({"reward": value(step)}, step=step, stage=STAGE)


def test_tensorboard_has_every_step_of_every_stage(tmp_path):
    board = TensorBoard(tmp_path)
    log_steps(board, [1, 2])
    board.log({"loss": 0.5}, step=1, stage="sft_target")
    # Read before closing: a killed run keeps its points.
    assert points(tmp_path / STAGE) == [(1, 1.0), (2, 2.0)]
    assert points(tmp_path / "sft_target", "loss") == [(1, 0.5)]
    board.close()


def test_steps_that_a_resumed_run_repeats_are_not_doubled_in_tensorboard(tmp_path):
    log_steps(TensorBoard(tmp_path), [1, 2, 3, 4])
    resumed = TensorBoard(tmp_path)
    log_steps(resumed, [3, 4, 5], value=lambda step: 10.0 * step)
    resumed.close()
    assert points(tmp_path / STAGE) == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_steps_repeated_within_one_process_are_not_doubled_in_tensorboard(tmp_path):
    board = TensorBoard(tmp_path)
    log_steps(board, [1, 2, 3])
    log_steps(board, [2, 3, 4], value=lambda step: 10.0 * step)
    board.close()
    assert points(tmp_path / STAGE) == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]


def test_a_service_that_only_appends_gets_every_step_once(tmp_path):
    record = tmp_path / "tracking" / "service.json"
    first, second = Remembering(), Remembering()
    log_steps(AppendOnly(first, record), [1, 2, 3])
    resumed = AppendOnly(second, record)
    log_steps(resumed, [2, 3, 4])
    resumed.log({"loss": 1.0}, step=1, stage="another")
    assert [step for _, step, _ in first.logged] == [1, 2, 3]
    assert [(stage, step) for stage, step, _ in second.logged] == [(STAGE, 4), ("another", 1)]
    assert (first.opened, second.opened) == ([None], ["run-7"])
    assert json.loads(record.read_text())["last_steps"] == {STAGE: 4, "another": 1}


def test_a_failing_tracker_warns_once_and_the_others_go_on(tmp_path, caplog):
    breaking, good = Breaking(), Remembering()
    trackers = Trackers([Guarded("Service", lambda: breaking), Guarded("Good", lambda: good)])
    with caplog.at_level(logging.WARNING):
        log_steps(trackers, [1, 2, 3])
        trackers.close()
    assert [step for _, step, _ in good.logged] == [1, 2, 3]
    assert good.is_closed
    assert len(caplog.messages) == 1
    assert "Service failed at step 2 of rl_source_1" in caplog.messages[0]
    assert "ConnectionError: server is gone" in caplog.messages[0]


def test_a_tracker_that_cannot_be_opened_warns_once(caplog):
    def refuse():
        raise PermissionError("no key")

    tracker = Guarded("Service", refuse)
    with caplog.at_level(logging.WARNING):
        log_steps(tracker, [1, 2])
        tracker.close()
    assert len(caplog.messages) == 1
    assert "PermissionError: no key" in caplog.messages[0]


def test_a_metric_that_is_no_number_is_left_out():
    good = Remembering()
    Trackers([good]).log({"reward": math.nan, "loss": 1, "gap": math.inf}, step=1, stage=STAGE)
    assert good.logged == [(STAGE, 1, {"loss": 1.0})]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"wandb_project": "past"}, "tracking.wandb_project=past .*pip install wandb"),
        ({"mlflow_uri": "http://mlflow"}, "tracking.mlflow_uri=http://mlflow .*install mlflow"),
    ],
)
def test_a_service_whose_package_is_missing_is_refused_before_the_run(monkeypatch, config, message):
    find_spec = importlib.util.find_spec
    missing = ("wandb", "mlflow")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    check_tracking(TrackingConfig())
    with pytest.raises(ConfigError, match=message):
        check_tracking(TrackingConfig(**config))


def test_event_files_are_written_without_any_setting_and_without_ray(tmp_path):
    trackers = open_trackers(TrackingConfig(), tmp_path, name="past")
    assert list(tmp_path.iterdir()) == []
    log_steps(trackers, [1, 2])
    trackers.close()
    assert points(tmp_path / "tensorboard" / STAGE) == [(1, 1.0), (2, 2.0)]


def test_mlflow_has_each_step_of_a_resumed_run_once(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, record = (tmp_path / "mlruns").as_uri(), tmp_path / "mlflow.json"
    for steps in ([1, 2], [2, 3]):
        tracker = AppendOnly(MLflowService(uri, name="past"), record)
        log_steps(tracker, steps)
        tracker.close()
    run_id = json.loads(record.read_text())["run_id"]
    history = tracking.MlflowClient(uri).get_metric_history(run_id, f"{STAGE}/reward")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_weights_and_biases_records_offline_without_a_key(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    record = tmp_path / "wandb.json"
    for steps in ([1, 2], [2, 3]):
        tracker = AppendOnly(WandbService("past", tmp_path, name="past"), record)
        log_steps(tracker, steps)
        tracker.close()
    run_id = json.loads(record.read_text())["run_id"]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))) >= 1
