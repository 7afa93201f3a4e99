"""The newest checkpoint that is whole is used, and an older one goes only after it was verified."""

import pytest

from past_ray.engine.learner_checkpoint import write_manifest
from past_ray.errors import StorageError
from past_ray.runtime.checkpoints import CheckpointStore, checkpoint_folder


def save(work_dir, step: int) -> None:
    folder = checkpoint_folder(work_dir, step)
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(100)))
    write_manifest(folder)


def steps(work_dir) -> list[str]:
    return sorted(path.name for path in work_dir.iterdir())


def test_an_empty_directory_has_step_zero(tmp_path):
    assert CheckpointStore(tmp_path, keep=()).newest_valid() == 0


def test_a_torn_file_makes_the_one_before_count(tmp_path):
    for step in (4, 8):
        save(tmp_path, step)
    weights = checkpoint_folder(tmp_path, 8) / "weights"
    weights.write_bytes(weights.read_bytes()[:50])
    assert CheckpointStore(tmp_path, keep=()).newest_valid() == 4
    assert steps(tmp_path) == ["step-000004", "torn-step-000008"]


def test_a_changed_byte_makes_the_one_before_count(tmp_path):
    for step in (4, 8):
        save(tmp_path, step)
    weights = checkpoint_folder(tmp_path, 8) / "weights"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    assert CheckpointStore(tmp_path, keep=()).newest_valid() == 4


def test_older_checkpoints_go_after_the_new_one_was_verified(tmp_path):
    for step in (4, 8, 12):
        save(tmp_path, step)
    CheckpointStore(tmp_path, keep={8}).accept(12)
    assert steps(tmp_path) == ["step-000008", "step-000012"]


def test_older_checkpoints_stay_when_the_new_one_is_torn(tmp_path):
    for step in (4, 8):
        save(tmp_path, step)
    (checkpoint_folder(tmp_path, 8) / "weights").unlink()
    with pytest.raises(StorageError, match="weights"):
        CheckpointStore(tmp_path, keep=()).accept(8)
    assert steps(tmp_path) == ["step-000004", "step-000008"]
