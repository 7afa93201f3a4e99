"""Which checkpoint of an RL run is used, and when an older one may go.

An older checkpoint is deleted only after the newer one was read back and found whole. If the
newest is torn all the same (a disk that lied, a copy that stopped), the next older one is used.
"""

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from past_ray.engine.learner_checkpoint import verify_checkpoint
from past_ray.errors import StorageError

logger = logging.getLogger(__name__)

PREFIX = "step-"


def checkpoint_folder(work_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` optimizer steps; a Hugging Face folder."""
    return work_dir / f"{PREFIX}{step:06d}"


class CheckpointStore:
    """The checkpoints ``step-000012`` of one work directory."""

    def __init__(self, work_dir: Path, *, keep: Collection[int]) -> None:
        """Keep the folder.

        Args:
            work_dir: Holds the checkpoints.
            keep: Steps whose checkpoint is never deleted.
        """
        self._work_dir = work_dir
        self._keep = set(keep)

    def newest_valid(self) -> int:
        """Return the step of the newest checkpoint that is whole; 0 if there is none.

        A torn one is moved aside as ``torn-step-000012``, so that nothing takes it for good later.
        """
        for step in sorted(self._steps(), reverse=True):
            folder = checkpoint_folder(self._work_dir, step)
            try:
                verify_checkpoint(folder)
            except StorageError as error:
                logger.warning("not continuing from %s: %s", folder.name, error)
                aside = folder.with_name(f"torn-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            else:
                return step
        return 0

    def accept(self, step: int) -> None:
        """Verify the checkpoint just written, then delete older ones nobody asked to keep.

        Raises:
            StorageError: If it is not whole; the older ones stay.
        """
        verify_checkpoint(checkpoint_folder(self._work_dir, step))
        for older in self._steps():
            if older < step and older not in self._keep:
                shutil.rmtree(checkpoint_folder(self._work_dir, older))

    def _steps(self) -> list[int]:
        folders = self._work_dir.glob(f"{PREFIX}*")
        return [
            int(f.name.removeprefix(PREFIX)) for f in folders if f.name[len(PREFIX) :].isdigit()
        ]
