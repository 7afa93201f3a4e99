"""Skill vectors as arithmetic: pure functions on tensors and on state dicts, no files.

All sums are float32, whatever the weights are stored in, and are rounded once at the end. Every
operation acts entry by entry with one IEEE operation at a time, so a result does not depend on how
tensors are cut; the fused ``add(alpha=...)`` would differ between a vector's body and its tail.

Checkpoints that go in should be stored in float32. An RL update at a learning rate of 1e-6 is
often smaller than one bfloat16 step (1.0 and 1.002 are the same bfloat16 number), and what saving
has rounded away no subtraction brings back.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError
from past_ray.skill.compatibility import check_float_tensors, check_same_parameters

Corrections = tuple[Tensor, Tensor]
"""Entry numbers ``[m]`` int64, ascending, and what float32 lost there ``[m]`` float32."""


def extract_skill_vector(
    *, rl: Mapping[str, Tensor], sft: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ``rl - sft``, tensor by tensor, in float32.

    ``v_k = theta_rl,k - theta_sft,k``: both come from the same source documents, so the knowledge
    they share cancels. In a later refinement round ``rl`` started from ``theta_sft,k + v_{k-1}``,
    but what is subtracted is still ``theta_sft,k``.

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
    check_same_parameters("rl", _shapes(rl), "sft", _shapes(sft))
    check_float_tensors("rl", rl)
    check_float_tensors("sft", sft)
    return {name: difference(rl[name].float(), sft[name].float()) for name in rl}


def inject_skill_vector(
    *,
    target: Mapping[str, Tensor],
    skill_vector: Mapping[str, Tensor],
    scale: float,
    corrections: Mapping[str, Corrections] | None = None,
) -> dict[str, Tensor]:
    """Return ``target + scale * skill_vector`` in the dtypes of ``target``.

    A parameter that the vector does not have stays as it is.

    Args:
        target: The target domain's SFT checkpoint.
        skill_vector: Float32 differences, from ``extract_skill_vector`` or ``load_skill``.
        scale: The paper's lambda; 1 in all its experiments.
        corrections: What ``load_skill`` returns with the differences; see ``correct``.

    Raises:
        SkillVectorError: The vector has other names or shapes, a tensor is not floating point, or
            ``scale`` is not finite.

    Reference:
        PaST https://arxiv.org/abs/2601.11258 section 3: theta_final = theta_sft + lambda * v.
    """
    check_scale(scale)
    shared = {name: tuple(target[name].shape) for name in target if name in skill_vector}
    check_same_parameters("target", shared, "skill_vector", _shapes(skill_vector))
    check_float_tensors("target", target)
    adapted: dict[str, Tensor] = {}
    for name, weight in target.items():
        if scale == 0 or name not in skill_vector:
            adapted[name] = weight.clone()
            continue
        vector = skill_vector[name].reshape(-1)
        wide = weight.reshape(-1).float()
        total = scaled_sum(wide, vector, scale)
        if corrections and name in corrections:
            correct(total, wide, vector, scale, corrections[name])
        adapted[name] = total.to(weight.dtype).view(weight.shape)
    return adapted


def check_scale(scale: float, *, of: str = "") -> None:
    """Refuse a factor that float32 cannot hold.

    Args:
        scale: The factor.
        of: Whose it is, for the message.

    Raises:
        SkillVectorError: It is NaN, infinite or too large.
    """
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise SkillVectorError(
            f"scale must be a finite number of float32, got {scale}{of}. The paper uses 1."
        )


def difference(rl: Tensor, sft: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return ``rl - sft`` in float32, with -0.0 where they are equal.

    It is computed as ``-(sft - rl)``: IEEE subtraction gives 0.0 for equal numbers, whose negative
    is -0.0, and -0.0 is what changes no number when it is added; 0.0 turns -0.0 into 0.0.
    """
    return torch.sub(sft, rl, out=out).neg_()


def scaled_sum(
    target: Tensor, vector: Tensor, scale: float, *, out: Tensor | None = None
) -> Tensor:
    """Return ``target + scale * vector`` in float32, product and sum each rounded once."""
    if scale == 1:
        return torch.add(target, vector, out=out)
    product = torch.mul(vector, scale, out=out)
    return torch.add(target, product, out=product)


def find_corrections(rl: Tensor, sft: Tensor, vector: Tensor, back: Tensor) -> Corrections | None:
    """Return what ``vector`` misses to give ``rl`` back bit for bit, or None if nothing.

    ``sft + vector`` is ``rl`` in float32 where ``rl`` lies between half and twice ``sft`` (there
    the difference is exact, Sterbenz). Elsewhere, say where a weight near 0 changed its sign, the
    difference may need more than 24 bits. Its rounding error is itself a float32 number (Knuth's
    TwoSum), which is kept for those entries. Where only the sign of a zero is lost, the correction
    is a zero of that sign.

    Args:
        rl: ``[n]`` float32.
        sft: ``[n]`` float32.
        vector: ``[n]`` their difference.
        back: ``[n]`` float32 ``sft + vector``.

    Reference:
        Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    if torch.equal(back.view(torch.int32), rl.view(torch.int32)):
        return None
    entries = (back.view(torch.int32) != rl.view(torch.int32)).nonzero().reshape(-1)
    a, b, total = rl[entries], -sft[entries], vector[entries]
    virtual_b = total - a
    error = (a - (total - virtual_b)) + (b - virtual_b)
    return entries, torch.where(error == 0, torch.copysign(torch.zeros_like(a), a), error)


def correct(
    total: Tensor, target: Tensor, vector: Tensor, scale: float, corrections: Corrections
) -> None:
    """Recompute corrected entries of ``total`` in place: ``target + scale * (vector + error)``.

    In float64, in which the vector's leading part cancels without loss. Into its own SFT parent at
    scale 1 this is the RL weight bit for bit. Into other targets it makes the sum more exact.

    Args:
        total: ``[n]`` float32, changed in place.
        target: ``[n]`` float32.
        vector: ``[n]`` float32.
        scale: Factor of the vector.
        corrections: From ``find_corrections``.
    """
    entries, errors = corrections
    exact = target[entries].double() + vector[entries].double() * scale
    exact = (exact + errors.double() * scale).float()
    total[entries] = torch.where((exact == 0) & (errors == 0), errors, exact)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
