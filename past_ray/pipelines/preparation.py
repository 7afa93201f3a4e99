"""The stages before any training: tables and theta_base."""

from past_ray.errors import ConfigError
from past_ray.pipelines.base_model import prepare_base
from past_ray.pipelines.data import domain_names, prepare_tables
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.stages import Stage, StageResult


def tables(lab: Laboratory) -> Stage:
    """Tables of all domains."""

    def work() -> StageResult:
        config = lab.config
        prepare_tables(config.task, lab.run, num_rounds=config.num_rounds, seed=config.seed)
        domains = {name: lab.domain(name) for name in domain_names(config.num_rounds)}
        return {
            name: {"documents": len(d.documents), "questions": len(d.questions)}
            for name, d in domains.items()
        }

    return Stage(name="data", work=work)


def base_model(lab: Laboratory) -> Stage:
    """theta_base, from the cache where it has one; prompts are checked against its limits."""

    def work() -> StageResult:
        config = lab.config
        folder = prepare_base(config.model, config.runtime, on_step=lab.on_sft_step)
        check_prompts(lab)
        return {"folder": str(folder)}

    pretrain = getattr(lab.config.model, "pretrain", None)
    return Stage(name="base", work=work, num_steps=pretrain.num_steps if pretrain else None)


def check_prompts(lab: Laboratory) -> None:
    """Refuse questions that the engine could not take, before anything trains on them."""
    config = lab.config
    limit = config.runtime.generator.max_model_len
    room = limit - max(config.rl.max_new_tokens, config.evaluation.max_new_tokens)
    for name in domain_names(config.num_rounds):
        in_context = name == "target" and "in_context" in config.arms
        examples = lab.domain(name).examples(in_context=in_context)
        lengths = [len(ids) for ids in lab.prompt_ids(examples)]
        too_long = [e.question_id for e, n in zip(examples, lengths, strict=True) if n > room]
        if too_long:
            raise ConfigError(
                f"runtime.generator.max_model_len must hold every prompt and its answer, got "
                f"{limit} while {len(too_long)} prompts of {name} are longer than {room} "
                f"tokens (longest {max(lengths)}, first {too_long[0]}). Raise it to at least "
                f"{max(lengths) + limit - room}; prompts are never cut."
            )
