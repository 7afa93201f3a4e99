"""Folders of killed runs are removed, those of living ones are not."""

import os
import subprocess
import sys

from past_ray.runtime import cluster


def test_only_folders_of_dead_processes_are_removed(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, living = f"past_ray_{ended.pid}_abc", f"past_ray_{os.getpid()}_abc"
    names = [dead, living, "past_ray_notes_1", "other"]
    for name in names:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(cluster, "FOLDER_PARENT", tmp_path)
    cluster._remove_dead_folders()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_this_machine_has_at_least_one_cpu():
    assert cluster.machine_supply()["CPU"] >= 1
