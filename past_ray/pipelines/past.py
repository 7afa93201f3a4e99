"""Parametric Skill Transfer, start to finish, with the arms it is compared to.

Notation of ``docs/algorithm.md``; every line below is one resumable stage::

    Stage I    theta_sft,k = SFT(theta_base, source_k)
               theta_rl,k  = RL(theta_sft,k + v_(k-1))        v_k = theta_rl,k - theta_sft,k
    Stage II   theta_target = SFT(theta_base, target)
               theta_final  = theta_target + scale * v        no RL and no label on the target

One refinement round takes all RL steps, two rounds take half each. RL has a constant learning rate,
so the first half of the one-round run *is* round 1 of the two-round run and is trained once.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from past_ray.config.experiment import ArmName, ExperimentConfig
from past_ray.config.texts import PassageTextsConfig, WindowTextsConfig
from past_ray.pipelines import data
from past_ray.pipelines.answering import Knowledge, evaluate
from past_ray.pipelines.diagnosis import diagnose_target
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.long_documents import document_figures, window_sft
from past_ray.pipelines.passages import adapters, write_texts
from past_ray.pipelines.preparation import base_model, tables
from past_ray.pipelines.progress import ProgressDisplay
from past_ray.pipelines.provenance import open_run
from past_ray.pipelines.report import write_report
from past_ray.pipelines.seal import seal_knowledge, seal_stages
from past_ray.pipelines.selection import (
    choose_skill_scale,
    measure_forgetting,
    validation_stage,
)
from past_ray.pipelines.stages import Stage
from past_ray.pipelines.summary import geometry_stage, summarise
from past_ray.pipelines.tracking import check_tracking
from past_ray.pipelines.training import rl, sft
from past_ray.pipelines.transfer import extract, inject
from past_ray.pipelines.window_texts import write_window_texts
from past_ray.runtime.cluster import ray_cluster

logger = logging.getLogger(__name__)

ONE_ROUND, TWO_ROUNDS, FIRST_OF_TWO = "one_round", "two_rounds", "first_of_two"
"""Skill vectors of a run."""

FORGETTING_MODELS = {"before": "base", "after": "adapted"}
"""Models that are measured on text outside all domains, before and after injection."""

OWN = "own"
"""Texts that theta_base wrote."""


def run_past(config: ExperimentConfig) -> dict[str, Any]:
    """Run, or continue, the whole experiment and return its report.

    Raises:
        ConfigError: If the run directory is another run's or the cluster cannot hold the run.
        DataError: If a table is malformed.
    """
    check_tracking(config.tracking)
    open_run(config)
    with (
        ray_cluster(config.runtime),
        ProgressDisplay() as progress,
        Laboratory(config, progress) as lab,
    ):
        stages = list(all_stages(lab))
        progress.expect(len(stages))
        lab.execute(stages)
        report = summarise(lab)
        if _has_windows(lab):
            report["documents"] = document_figures(lab)
    write_report(report, config.run_dir)
    return report


def all_stages(lab: Laboratory) -> Iterator[Stage]:
    """All stages of the configured arms in the order they run."""
    parts = (_knowledge, _skill, _rival, _scale, _transfer, _evaluation)
    yield from itertools.chain.from_iterable(part(lab) for part in parts)
    yield geometry_stage(lab)


def dose_model(lab: Laboratory, steps: int) -> str:
    """Model after a target SFT of ``steps`` steps, each with a full learning-rate schedule."""
    return "sft_target" if steps == lab.config.sft.num_steps else f"sft_dose_{steps}"


def _knowledge(lab: Laboratory) -> Iterator[Stage]:
    """SFT of every domain, always from theta_base (paper, Appendix E)."""
    config = lab.config
    yield tables(lab)
    yield base_model(lab)
    if config.texts is not None:
        *sources, target = data.domain_names(config.num_rounds)
        if config.skill_scale is None:
            sources.append(data.VALIDATION)
        for name, domains in {"texts_source": sources, "texts_target": [target]}.items():
            yield _write(lab, name, config.texts, domains=domains)
    texts = _texts(lab)
    for k in range(1, config.num_rounds + 1):
        yield _sft(lab, f"sft_source_{k}", init="base", domain=f"source_{k}", texts=texts)
    yield _learn(lab, "sft_target", init="base", texts=texts)
    if "passage_only" in config.arms:
        yield _learn(lab, "passage_only", init="base", texts=None)
    for steps in config.evaluation.dose_steps:
        if steps != config.sft.num_steps:
            yield sft(
                lab,
                dose_model(lab, steps),
                init="base",
                domain="target",
                texts=texts,
                num_steps=steps,
            )


def _write(
    lab: Laboratory,
    name: str,
    texts: PassageTextsConfig | WindowTextsConfig,
    *,
    domains: Sequence[str],
) -> Stage:
    """What theta_base writes about whole passages or about windows of long documents."""
    if isinstance(texts, WindowTextsConfig):
        return write_window_texts(lab, name, texts, writer=OWN, model="base", domains=domains)
    return write_texts(lab, name, texts, writer=OWN, model="base", domains=domains)


def _sft(lab: Laboratory, name: str, *, init: str, domain: str, texts: str | None) -> Stage:
    """SFT on whole passages, or in phases on windows of long documents."""
    train = window_sft if _has_windows(lab) else sft
    return train(lab, name, init=init, domain=domain, texts=texts)


def _has_windows(lab: Laboratory) -> bool:
    return isinstance(lab.config.texts, WindowTextsConfig)


def _learn(
    lab: Laboratory, name: str, *, init: str, texts: str | None, domain: str = data.TARGET
) -> Stage:
    """New documents into weights: one model, or an adapter per passage (n=1)."""
    learn = _sft if lab.config.single_passage is None else adapters
    return learn(lab, name, init=init, domain=domain, texts=texts)


def _known(lab: Laboratory, name: str, *, init: str = "base") -> Knowledge:
    """What ``_learn`` made: a model by itself, adapters on the model they started from."""
    if lab.config.single_passage is None:
        return Knowledge(model=name)
    return Knowledge(model=init, adapters=name)


def _texts(lab: Laboratory) -> str:
    """Who wrote the texts that are trained besides the passages."""
    return data.GIVEN if lab.config.texts is None else OWN


def _skill(lab: Laboratory) -> Iterator[Stage]:
    """RL on the source and the skill vectors it leaves."""
    config = lab.config
    two_rounds = config.num_rounds == 2
    # Questions that the model wrote itself, as long as it wrote any about a document.
    questions = data.PAIRS if _has_windows(lab) else data.QUESTIONS
    yield rl(
        lab,
        "rl_source_1",
        init="sft_source_1",
        reference="sft_source_1",
        domain="source_1",
        num_steps=config.rl.num_steps,
        questions=questions,
        keep_steps=(config.steps_per_round,) if two_rounds else (),
    )
    yield extract(lab, ONE_ROUND, rl="rl_source_1", sft="sft_source_1", refinement_round=1)
    if not two_rounds:
        return
    yield extract(
        lab,
        FIRST_OF_TWO,
        rl=f"rl_source_1-step{config.steps_per_round}",
        sft="sft_source_1",
        refinement_round=1,
    )
    yield inject(lab, "init_source_2", target="sft_source_2", skill=FIRST_OF_TWO, scale=1.0)
    yield rl(
        lab,
        "rl_source_2",
        init="init_source_2",
        reference="sft_source_2" if config.rl.kl.reference == "sft" else "init_source_2",
        domain="source_2",
        num_steps=config.steps_per_round,
        questions=questions,
    )
    yield extract(
        lab,
        TWO_ROUNDS,
        rl="rl_source_2",
        sft="sft_source_2",
        refinement_round=2,
        parent=FIRST_OF_TWO,
    )


def _rival(lab: Laboratory) -> Iterator[Stage]:
    """SEAL's search, after the skill: a vector's provenance hashes all tables of its source."""
    if "seal" in lab.config.arms:
        yield from seal_stages(lab)


def _scale(lab: Laboratory) -> Iterator[Stage]:
    """The scale of v, chosen where there are labels: on a further source domain."""
    if lab.config.skill_scale is not None:
        return
    yield _learn(lab, "sft_validation", init="base", texts=_texts(lab), domain=data.VALIDATION)
    for scale in lab.config.evaluation.scales:
        yield evaluate(
            lab,
            validation_stage(scale),
            _known(lab, "sft_validation"),
            skill=ONE_ROUND,
            scale=scale,
            domain=data.VALIDATION,
        )
    yield choose_skill_scale(lab)


def _transfer(lab: Laboratory) -> Iterator[Stage]:
    """PaST's injection, and the arms that would do something else instead."""
    config, texts = lab.config, _texts(lab)
    is_single = config.single_passage is not None
    # Adapters go on theta_base + v: the sum is linear, so they need not know of it.
    target = "base" if is_single else "sft_target"
    yield inject(lab, "adapted", target=target, skill=ONE_ROUND)
    if "sequential" in config.arms:
        yield _learn(lab, "sequential", init="rl_source_1", texts=texts)
    if "pre_injection" in config.arms:
        yield inject(lab, "base_with_skill", target="base", skill=ONE_ROUND)
        yield _learn(lab, "pre_injection", init="base_with_skill", texts=texts)
    if "target_rl" in config.arms:
        yield rl(
            lab,
            "target_rl",
            init="sft_target",
            reference="sft_target",
            domain="target",
            num_steps=config.rl.num_steps,
            questions=data.RL_QUESTIONS,
        )


def _evaluation(lab: Laboratory) -> Iterator[Stage]:
    """Every arm, the scale sweep and the dose curve on the same held-out questions."""
    config = lab.config
    base, target = Knowledge(model="base"), _known(lab, "sft_target")
    past = Knowledge(model="adapted", adapters=target.adapters)
    arms: dict[ArmName, Stage] = {
        "base": evaluate(lab, "eval_base", base),
        "in_context": evaluate(lab, "eval_in_context", base, in_context=True),
        "target_rl": evaluate(lab, "eval_target_rl", Knowledge(model="target_rl")),
        "passage_only": evaluate(lab, "eval_passage_only", _known(lab, "passage_only")),
        "target_sft": evaluate(lab, "eval_target_sft", target),
        "seal": evaluate(lab, "eval_seal", seal_knowledge(lab)),
        "sequential": evaluate(
            lab, "eval_sequential", _known(lab, "sequential", init="rl_source_1")
        ),
        "pre_injection": evaluate(
            lab, "eval_pre_injection", _known(lab, "pre_injection", init="base_with_skill")
        ),
        "past": evaluate(lab, "eval_past", past),
        "past_two_rounds": evaluate(lab, "eval_past_two_rounds", target, skill=TWO_ROUNDS),
    }
    yield from (stage for arm, stage in arms.items() if arm in config.arms)
    for swept in config.evaluation.scales:
        yield evaluate(lab, f"eval_scale_{swept:g}", target, skill=ONE_ROUND, scale=swept)
    for steps in config.evaluation.dose_steps:
        dosed = Knowledge(model=dose_model(lab, steps))
        yield evaluate(lab, f"eval_dose_{steps}_sft", dosed)
        yield evaluate(lab, f"eval_dose_{steps}_past", dosed, skill=ONE_ROUND)
    if config.evaluation.num_diagnostic_samples:
        yield diagnose_target(lab, before=target, after=past)
    if data.HELD_OUT in data.further_domain_names(config.task):
        for label, model in FORGETTING_MODELS.items():
            yield evaluate(
                lab,
                f"eval_held_out_{label}",
                Knowledge(model=model),
                in_context=True,
                domain=data.HELD_OUT,
            )
        yield measure_forgetting(lab, models=FORGETTING_MODELS)
