"""Skill vectors as arithmetic on state dicts: pure functions, no files.

Checkpoints that go in should be stored in float32. An RL update at a learning rate of 1e-6 is
often smaller than one bfloat16 step (1.0 and 1.002 are the same bfloat16 number), and what saving
has rounded away no subtraction brings back.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError
from past_ray.skill.compatibility import check_same_parameters


def extract_skill_vector(
    *, rl: Mapping[str, Tensor], sft: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ``rl - sft``, tensor by tensor, in float32.

    ``v_k = theta_rl,k - theta_sft,k``: both come from the same source documents, so the knowledge
    they share cancels. In a later refinement round ``rl`` started from ``theta_sft,k + v_{k-1}``,
    but what is subtracted is still ``theta_sft,k``.

    Adding the vector back to ``sft`` gives ``rl`` bit for bit wherever ``rl`` lies between half and
    twice ``sft``: there the float32 difference is exact (Sterbenz). Elsewhere, say where a weight
    changed its sign, the difference is rounded once and the sum once, so ``rl`` comes back within
    ``2**-24 * (|rl - sft| + |rl|)`` to first order. For parents stored in bfloat16 the final
    rounding to bfloat16 hides that error, unless ``sft`` is more than 2**15 times ``rl``.

    Args:
        rl: The source domain's policy after RL.
        sft: The source domain's SFT checkpoint.

    Raises:
        SkillVectorError: Names or shapes differ, or a tensor is not floating point.

    Reference:
        PaST https://arxiv.org/abs/2601.11258 section 3 and Appendix E.

    Differs from the paper:
        Its authors subtract and add in bfloat16.
    """
    check_same_parameters("rl", rl, "sft", sft)
    return {name: rl[name].float() - sft[name].float() for name in rl}


def inject_skill_vector(
    *, target: Mapping[str, Tensor], skill_vector: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """Return ``target + scale * skill_vector`` in the dtypes of ``target``.

    The sum is taken in float32 (float64 for a float64 target) and rounded once. With ``scale`` 0
    the result is a bitwise copy: an addition would turn -0.0 into 0.0.

    Args:
        target: The target domain's SFT checkpoint.
        skill_vector: Float32 differences from ``extract_skill_vector``.
        scale: The paper's lambda; 1 in all its experiments.

    Raises:
        SkillVectorError: Names or shapes differ, a tensor is not floating point, or ``scale`` is
            not finite.

    Reference:
        PaST https://arxiv.org/abs/2601.11258 section 3: theta_final = theta_sft + lambda * v.
    """
    if not math.isfinite(scale):
        raise SkillVectorError(f"scale must be a finite number, got {scale}. The paper uses 1.")
    check_same_parameters("target", target, "skill_vector", skill_vector)
    if scale == 0:
        return {name: weight.clone() for name, weight in target.items()}
    return {name: _add(target[name], skill_vector[name], scale) for name in target}


def _add(weight: Tensor, difference: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + difference.to(wide) * scale).to(weight.dtype)
