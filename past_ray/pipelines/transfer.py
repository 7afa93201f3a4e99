"""The stages of weight arithmetic: the skill vector and its injection."""

from past_ray.config.judge import (
    EndpointJudgeConfig,
    JudgeConfig,
    ModelJudgeConfig,
    RuleJudgeConfig,
)
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.stages import Stage, StageResult
from past_ray.skill import Provenance
from past_ray.skill import extract as extract_skill
from past_ray.skill import inject as inject_skill
from past_ray.skill.manifest import hash_files


def extract(
    lab: Laboratory,
    name: str,
    *,
    rl: str,
    sft: str,
    refinement_round: int,
    parent: str | None = None,
) -> Stage:
    """Skill vector ``v = rl - sft``."""

    def work() -> StageResult:
        config = lab.config
        manifest = extract_skill(
            lab.model(rl),
            lab.model(sft),
            lab.run.skill(name),
            provenance=Provenance(
                task=config.task.kind,
                refinement_round=refinement_round,
                source_data_hash=hash_files(
                    list(lab.run.tables(f"source_{refinement_round}").rglob("*.parquet"))
                ),
                rl_recipe=config.rl.model_dump(mode="json"),
                reward=_reward_name(config.judged_by),
                seed=config.seed,
            ),
            base=lab.model("base"),
            parent=lab.run.skill(parent) if parent else None,
        )
        return manifest.model_dump(mode="json", exclude={"tensors", "base_sketch"})

    return Stage(name=name, work=work)


def inject(
    lab: Laboratory, name: str, *, target: str, skill: str, scale: float | None = None
) -> Stage:
    """Model ``target + scale * v``; without a scale, that of the run."""

    def work() -> StageResult:
        factor = lab.skill_scale() if scale is None else scale
        inject_skill(
            lab.model(target),
            lab.run.skill(skill),
            lab.model(name),
            scale=factor,
            verify=True,
        )
        return {"scale": factor}

    return Stage(name=name, work=work)


def _reward_name(judge: JudgeConfig) -> str:
    match judge:
        case RuleJudgeConfig():
            return judge.rule
        case ModelJudgeConfig():
            return f"model {judge.path.name}"
        case EndpointJudgeConfig():
            return f"endpoint model {judge.model}"
