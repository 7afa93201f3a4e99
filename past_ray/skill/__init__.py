"""Skill vectors: what RL adds to a fine-tuned model, kept apart and added to other models.

The functions here work on folders of any size, on a local disk, NFS, ``s3://`` or ``gs://``, and
are what ``past-ray skill`` calls. ``arithmetic`` has the same on state dicts in memory.
"""

from past_ray.skill.artefact import LoadedSkill, load_skill
from past_ray.skill.combination import MergeRule, combine
from past_ray.skill.comparison import Comparison, compare
from past_ray.skill.extraction import extract
from past_ray.skill.injection import Rounding, check_target, inject, sweep
from past_ray.skill.inspection import Inspection, inspect
from past_ray.skill.manifest import Provenance, SkillManifest, load_manifest
from past_ray.skill.selection import select
from past_ray.skill.stream import StreamSettings
from past_ray.skill.verification import Verification, verify

__all__ = [
    "Comparison",
    "Inspection",
    "LoadedSkill",
    "MergeRule",
    "Provenance",
    "Rounding",
    "SkillManifest",
    "StreamSettings",
    "Verification",
    "check_target",
    "combine",
    "compare",
    "extract",
    "inject",
    "inspect",
    "load_manifest",
    "load_skill",
    "select",
    "sweep",
    "verify",
]
