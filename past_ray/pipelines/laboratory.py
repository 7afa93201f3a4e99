"""The verbs of an experiment as stages: sft, rl, extract, inject, evaluate.

Every verb returns a ``Stage``; stages meet in named folders of the run directory and nowhere else,
so any prefix of them may have run in an earlier process. ``past.py`` puts them in order.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from past_ray.config.experiment import ExperimentConfig
from past_ray.envs.chat import chat_codec
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.errors import ConfigError
from past_ray.pipelines.base_model import cached_base, prepare_base
from past_ray.pipelines.data import (
    QUESTIONS,
    Domain,
    domain_names,
    load_domain,
    prepare_tables,
    question_kind,
)
from past_ray.pipelines.evaluation import evaluate
from past_ray.pipelines.progress import ProgressDisplay
from past_ray.pipelines.stages import RunDirectory, StageResult
from past_ray.pipelines.tracking import open_trackers
from past_ray.runtime.checkpoints import checkpoint_folder
from past_ray.runtime.cluster import cluster_supply
from past_ray.runtime.controller import RLRun, train_grpo
from past_ray.runtime.placement import fits_together
from past_ray.runtime.session import RLSession
from past_ray.runtime.sft_trainer import train_sft
from past_ray.sft.examples import document_examples
from past_ray.skill import Provenance, extract, inject, load_skill
from past_ray.skill.arithmetic import inject_skill_vector
from past_ray.skill.checkpoint import load_weights, save_checkpoint
from past_ray.skill.manifest import hash_files
from past_ray.storage import read_jsonl
from past_ray.tasks.examples import QAExample
from past_ray.tasks.grading import GRADERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One resumable piece of work."""

    name: str
    """Unique in the run; names its record and its folders."""

    work: Callable[[], StageResult]
    """Does it and returns what later stages and the report read."""

    num_steps: int | None = None
    """Steps of the progress bar."""


class Laboratory(AbstractContextManager["Laboratory"]):
    """Holds what stages share: the run directory, the open RL session and the display."""

    def __init__(self, config: ExperimentConfig, progress: ProgressDisplay) -> None:
        self.config = config
        self.run = RunDirectory(config.run_dir)
        self._progress = progress
        self._runner = asyncio.Runner()
        self._session: RLSession | None = None
        self._num_evaluated = 0
        self._trackers = open_trackers(config.tracking, config.run_dir, name=config.name)
        self._stage = ""

    def __exit__(self, *_: object) -> None:
        """End the RL actors."""
        self._trackers.close()
        self.close_session()
        self._runner.close()

    def execute(self, stages: Iterable[Stage]) -> None:
        """Run every stage that has not finished before."""
        for stage in stages:
            self._stage = stage.name
            with self._progress.stage(stage.name, stage.num_steps):
                self.run.run(stage.name, stage.work)

    # Stages

    def data(self) -> Stage:
        """Tables of all domains."""

        def work() -> StageResult:
            config = self.config
            prepare_tables(config.task, self.run, num_rounds=config.num_rounds, seed=config.seed)
            domains = {name: self.domain(name) for name in domain_names(config.num_rounds)}
            return {
                name: {"documents": len(d.documents), "questions": len(d.questions)}
                for name, d in domains.items()
            }

        return Stage(name="data", work=work)

    def base(self) -> Stage:
        """theta_base, from the cache where it has one; prompts are checked against its limits."""

        def work() -> StageResult:
            config = self.config
            folder = prepare_base(config.model, config.runtime, on_step=self._on_sft_step)
            self._check_prompts()
            return {"folder": str(folder)}

        pretrain = getattr(self.config.model, "pretrain", None)
        return Stage(name="base", work=work, num_steps=pretrain.num_steps if pretrain else None)

    def sft(
        self,
        name: str,
        *,
        init: str,
        domain: str,
        num_steps: int | None = None,
    ) -> Stage:
        """SFT of the model ``init`` on the documents of ``domain``."""
        sft = self.config.sft
        if num_steps is not None:
            sft = sft.model_copy(update={"num_steps": num_steps})

        def work() -> StageResult:
            self._make_room_for_sft()
            tokenizer = self._tokenizer()
            texts = self.domain(domain).texts
            result = train_sft(
                examples=document_examples(texts, tokenizer, max_length=sft.max_length),
                init_folder=self.model(init),
                out_folder=self.model(name),
                sft=sft,
                runtime=self.config.runtime,
                seed=self.config.seed,
                work_dir=self.run.work(name),
                on_step=self._on_sft_step,
            )
            return {
                "losses": result.losses,
                "num_tokens": result.num_tokens,
                "training_seconds": result.seconds,
            }

        return Stage(name=name, work=work, num_steps=sft.num_steps)

    def rl(
        self,
        name: str,
        *,
        init: str,
        reference: str,
        domain: str,
        num_steps: int,
        questions: str = QUESTIONS,
        keep_steps: Sequence[int] = (),
    ) -> Stage:
        """GRPO from the model ``init`` on the questions of ``domain``."""
        rl = self.config.rl.model_copy(update={"num_steps": num_steps})

        def work() -> StageResult:
            examples = self.domain(domain, questions=questions).examples()
            run = RLRun(
                init_folder=self.model(init).resolve(),
                reference_folder=self.model(reference).resolve(),
                work_dir=self.run.work(name).resolve(),
                seed=self.config.seed,
                keep_steps=tuple(keep_steps),
            )
            last = self._runner.run(
                train_grpo(
                    self.session(),
                    run,
                    rl,
                    examples=examples,
                    probe=self._prompt_ids(examples[: rl.num_parity_prompts]),
                    on_step=self._on_rl_step,
                )
            )
            for step in (*keep_steps, num_steps):
                weights = load_weights(checkpoint_folder(run.work_dir, step))
                out = self.model(name if step == num_steps else f"{name}-step{step}")
                save_checkpoint(out, weights, like=last)
            return {"metrics": read_jsonl(run.work_dir / "metrics.jsonl")}

        return Stage(name=name, work=work, num_steps=num_steps)

    def extract(
        self, name: str, *, rl: str, sft: str, refinement_round: int, parent: str | None = None
    ) -> Stage:
        """Skill vector ``v = rl - sft``."""

        def work() -> StageResult:
            config = self.config
            manifest = extract(
                self.model(rl),
                self.model(sft),
                self.run.skill(name),
                provenance=Provenance(
                    task=config.task.kind,
                    refinement_round=refinement_round,
                    source_data_hash=hash_files(
                        list(self.run.tables(f"source_{refinement_round}").glob("*.parquet"))
                    ),
                    rl_recipe=config.rl.model_dump(mode="json"),
                    reward=config.task.reward,
                    seed=config.seed,
                ),
                base=self.model("base"),
                parent=self.run.skill(parent) if parent else None,
            )
            return manifest.model_dump(mode="json", exclude={"tensors", "base_sketch"})

        return Stage(name=name, work=work)

    def inject(self, name: str, *, target: str, skill: str, scale: float) -> Stage:
        """Model ``target + scale * v``."""

        def work() -> StageResult:
            inject(
                self.model(target),
                self.run.skill(skill),
                self.model(name),
                scale=scale,
                verify=True,
            )
            return {"scale": scale}

        return Stage(name=name, work=work)

    def evaluate(
        self,
        name: str,
        *,
        model: str,
        skill: str | None = None,
        scale: float = 0.0,
        in_context: bool = False,
    ) -> Stage:
        """Answers of ``model + scale * v`` to the held-out questions."""

        def work() -> StageResult:
            weights = load_weights(self.model(model))
            if skill is not None:
                loaded = load_skill(self.run.skill(skill))
                weights = inject_skill_vector(
                    target=weights,
                    skill_vector=loaded.vector,
                    scale=scale,
                    corrections=loaded.corrections,
                )
            examples = self.domain("target").examples(in_context=in_context)
            result = self._runner.run(self._evaluate(weights, examples))
            self._progress.step(1, result)
            return result

        return Stage(name=name, work=work, num_steps=1)

    # What stages share

    def domain(self, name: str, *, questions: str = QUESTIONS) -> Domain:
        """Tables of the domain ``name``."""
        return load_domain(self.config.task, self.run, name, questions=questions)

    def model(self, name: str) -> Path:
        """Folder of the model ``name``; ``base`` may be cached, ``adapted`` is the product."""
        if name == "base":
            return cached_base(self.config.model)
        return self.run.root / name if name == "adapted" else self.run.model(name)

    def session(self) -> RLSession:
        """The open RL session; the first call opens it."""
        if self._session is None:
            session = RLSession(
                self.config.runtime,
                self.config.rl,
                model_folder=self.model("base"),
                make_env=partial(ClosedBookQA, grade=GRADERS[self.config.task.reward]),
            )
            self._session = session
            self._runner.run(session.open())
        return self._session

    def close_session(self) -> None:
        """End the RL actors, if any."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _make_room_for_sft(self) -> None:
        if self._session and not fits_together(self.config.runtime, cluster_supply()):
            logger.info("ending the RL actors: the cluster does not hold them and an SFT stage")
            self.close_session()

    async def _evaluate(
        self, weights: Mapping[str, Tensor], examples: Sequence[QAExample]
    ) -> StageResult:
        session = self.session()
        self._num_evaluated += 1
        await session.load_generators(weights, policy_version=self._num_evaluated)
        config = self.config.evaluation
        return await evaluate(
            session,
            examples,
            max_new_tokens=config.max_new_tokens,
            correct_at=config.correct_at,
            grading_timeout_s=self.config.rl.reward_timeout_s,
            num_bootstrap=config.num_bootstrap,
            kind_of=lambda question_id: question_kind(self.config.task, question_id),
        )

    def _on_sft_step(self, row: Mapping[str, float]) -> None:
        """Show and track a step; SFT counts them from 0."""
        tokens_per_s = row["tokens"] / row["seconds"]
        self._on_step(int(row["step"]) + 1, {**row, "tokens_per_s": tokens_per_s})

    def _on_rl_step(self, row: Mapping[str, float]) -> None:
        self._on_step(int(row["step"]), row)

    def _on_step(self, step: int, row: Mapping[str, float]) -> None:
        self._progress.step(step, row)
        self._trackers.log(row, step=step, stage=self._stage)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.model("base"))

    def _prompt_ids(self, examples: Sequence[QAExample]) -> list[list[int]]:
        codec = chat_codec(self._tokenizer())
        return [codec.render(list(example.messages)) for example in examples]

    def _check_prompts(self) -> None:
        """Refuse questions that the engine could not take, before anything trains on them."""
        config = self.config
        limit = config.runtime.generator.max_model_len
        room = limit - max(config.rl.max_new_tokens, config.evaluation.max_new_tokens)
        for name in domain_names(config.num_rounds):
            in_context = name == "target" and "in_context" in config.arms
            examples = self.domain(name).examples(in_context=in_context)
            lengths = [len(ids) for ids in self._prompt_ids(examples)]
            too_long = [e.question_id for e, n in zip(examples, lengths, strict=True) if n > room]
            if too_long:
                raise ConfigError(
                    f"runtime.generator.max_model_len must hold every prompt and its answer, got "
                    f"{limit} while {len(too_long)} prompts of {name} are longer than {room} "
                    f"tokens (longest {max(lengths)}, first {too_long[0]}). Raise it to at least "
                    f"{max(lengths) + limit - room}; prompts are never cut."
                )
