"""Stage records -> the figures of the report."""

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from past_ray.build_info import git_commit, versions
from past_ray.config.loading import dump_config
from past_ray.pipelines.comparison import compare_with_paper
from past_ray.pipelines.diagnosis import DIAGNOSTICS
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.seal import seal_figures
from past_ray.pipelines.self_edits import PREFIX as SEAL_ROUNDS
from past_ray.pipelines.stages import SCALE_CHOICE, Stage, StageResult
from past_ray.skill.checkpoint import load_weights
from past_ray.skill.geometry import (
    PROJECTION_MODULES,
    ModuleCosine,
    cosine_table,
    mean_cosine,
    update,
)

ADAPTATION_STAGES: dict[str, tuple[str, ...]] = {
    "base": (),
    "in_context": (),
    "passage_only": ("passage_only",),
    "target_sft": ("sft_target",),
    "seal": ("texts_seal", "seal"),
    "sequential": ("sft_source_1", "rl_source_1", "sequential"),
    "pre_injection": (
        "sft_source_1",
        "rl_source_1",
        "one_round",
        "base_with_skill",
        "pre_injection",
    ),
    "past": ("sft_source_1", "rl_source_1", "one_round", "sft_target", "adapted"),
    "past_two_rounds": (
        "sft_source_1",
        "first_of_two",
        "sft_source_2",
        "init_source_2",
        "rl_source_2",
        "two_rounds",
        "sft_target",
    ),
    "target_rl": ("sft_target", "target_rl"),
}
"""Stages behind each arm, for SEAL besides its rounds; their seconds are the arm's cost."""

SOURCE_STAGES = {
    "sft_source_1",
    "sft_source_2",
    "rl_source_1",
    "rl_source_2",
    "one_round",
    "two_rounds",
    "first_of_two",
    "init_source_2",
    "base_with_skill",
    "texts_source",
}
"""Paid once for all targets; the others are paid for every new target."""

TEXT_ARMS = ADAPTATION_STAGES.keys() - {"base", "in_context", "passage_only", "seal"}
"""Arms that train on texts which theta_base wrote, where it writes any; all but target SFT and RL
on the target use the source's too."""

TEXT_STAGES = ("texts_source", "texts_target")

UPDATES = {
    "sft_source": ("sft_source_1", "base"),
    "rl_source": ("rl_source_1", "sft_source_1"),
    "sft_target": ("sft_target", "base"),
    "rl_target": ("target_rl", "sft_target"),
}
"""Updates whose directions are compared: (after, before)."""

PER_QUESTION = {"answers", "correct"}
"""What a record has for every question; the report shows a few."""

COSINE_PAIRS = {
    "sft_source__rl_source": ("sft_source", "rl_source"),
    "sft_target__rl_source": ("sft_target", "rl_source"),
    "sft_source__sft_target": ("sft_source", "sft_target"),
    "rl__rl": ("rl_source", "rl_target"),
}
"""The paper's pairs (section 5) and its same-kind controls."""


def geometry_stage(lab: Laboratory) -> Stage:
    """Cosine per layer and module between the updates of the run."""

    def work() -> StageResult:
        present = {
            name: (lab.model(after), lab.model(before))
            for name, (after, before) in UPDATES.items()
            if lab.model(after).exists()
        }
        updates = {
            name: update(load_weights(after), load_weights(before))
            for name, (after, before) in present.items()
        }
        return {
            pair: _pair(cosine_table(updates[left], updates[right]))
            for pair, (left, right) in COSINE_PAIRS.items()
            if left in updates and right in updates
        }

    return Stage(name="geometry", work=work)


def summarise(lab: Laboratory) -> dict[str, Any]:
    """Build the report from the records of all stages."""
    config, seconds = lab.config, lab.run.stage_seconds()
    geometry = lab.result("geometry")
    evaluations = {arm: lab.result(f"eval_{arm}") for arm in config.arms}
    paper = compare_with_paper(lab, evaluations)
    return {
        "name": config.name,
        "seed": config.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_commit": git_commit(),
        "num_heldout_questions": len(lab.domain("target").questions),
        "arms": {arm: _arm(arm, result, seconds) for arm, result in evaluations.items()},
        "scale_sweep": [
            {"scale": scale, **_figures(lab.result(f"eval_scale_{scale:g}"))}
            for scale in config.evaluation.scales
        ],
        "dose_curve": [
            {
                "sft_steps": steps,
                "target_sft": lab.result(f"eval_dose_{steps}_sft")["accuracy"],
                "past": lab.result(f"eval_dose_{steps}_past")["accuracy"],
            }
            for steps in config.evaluation.dose_steps
        ],
        "cosines": {pair: values["mean"] for pair, values in geometry.items()},
        "cosine_modules": {pair: values["modules"] for pair, values in geometry.items()},
        "weight_sync": _weight_sync(lab),
        "training": {
            "sft": _series(lab, "losses"),
            "rl": _series(lab, "metrics"),
        },
        "stage_seconds": seconds,
        "answers": _answers(lab, evaluations),
        **_optional(lab),
        **(seal_figures(lab) if "seal" in config.arms else {}),
        **({"paper": paper, "differences_from_paper": paper["differences"]} if paper else {}),
        "config": dump_config(config),
    }


def _optional(lab: Laboratory) -> dict[str, Any]:
    """Figures that only some runs have."""
    names = [SCALE_CHOICE, "forgetting", DIAGNOSTICS, *TEXT_STAGES]
    found = {name: lab.run.finished(name) for name in names}
    figures = {name: result for name, result in found.items() if result is not None}
    for label, result in figures.get("forgetting", {}).items():
        result["in_context"] = _figures(lab.result(f"eval_held_out_{label}"))
    return figures


def _pair(table: Sequence[ModuleCosine]) -> dict[str, Any]:
    projections = [row for row in table if row.module in PROJECTION_MODULES]
    return {
        "mean": mean_cosine(table),
        "modules": [
            {"layer": row.layer, "module": row.module, "cosine": row.cosine} for row in projections
        ],
    }


def _figures(evaluation: StageResult) -> dict[str, Any]:
    return {"accuracy": evaluation["accuracy"], "ci95": evaluation["ci95"]}


def _arm(arm: str, evaluation: StageResult, seconds: dict[str, float]) -> dict[str, Any]:
    figures = {key: value for key, value in evaluation.items() if key not in PER_QUESTION}
    stages = list(ADAPTATION_STAGES[arm])
    if arm in TEXT_ARMS:
        needed = TEXT_STAGES[1:] if arm in ("target_sft", "target_rl") else TEXT_STAGES
        stages += [stage for stage in needed if stage in seconds]
    search = [stage for stage in seconds if arm == "seal" and stage.startswith(SEAL_ROUNDS)]
    return {
        **figures,
        "seconds": sum(seconds[stage] for stage in (*search, *stages)),
        "seconds_per_new_target": sum(seconds[s] for s in stages if s not in SOURCE_STAGES),
    }


def _weight_sync(lab: Laboratory) -> dict[str, float]:
    rows = [row for metrics in _series(lab, "metrics").values() for row in metrics]
    return {
        "max_logprob_gap": max(row["logprob_gap"] for row in rows),
        "median_seconds": statistics.median(row["sync_seconds"] for row in rows),
        "num_syncs": len(rows),
    }


def _series(lab: Laboratory, key: str) -> dict[str, list[Any]]:
    """Per-step series of every stage that has ``key`` in its record."""
    records = {stage: lab.result(stage) for stage in lab.run.stage_seconds()}
    return {stage: record[key] for stage, record in records.items() if key in record}


def _answers(lab: Laboratory, evaluations: dict[str, StageResult]) -> list[dict[str, Any]]:
    """Some held-out questions, spread evenly over the table, with every arm's answer."""
    rows = lab.domain("target").questions.to_pylist()
    wanted = lab.config.evaluation.num_example_answers
    shown = rows[:: max(1, len(rows) // wanted)][:wanted] if wanted else []
    return [
        {
            "question": row["question"],
            "gold": row["answer"],
            "answers": {
                arm: result["answers"][row["question_id"]] for arm, result in evaluations.items()
            },
        }
        for row in shown
    ]
