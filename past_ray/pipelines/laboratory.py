"""What the stages of an experiment share: folders, open actors, tokenizer and display.

The stages themselves are functions of a ``Laboratory``: ``preparation``, ``training``,
``transfer`` and ``answering``. They meet in named folders of the run directory and nowhere else, so
any prefix of them may have run in an earlier process. ``past.py`` puts them in order.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from past_ray.config.experiment import ExperimentConfig
from past_ray.config.judge import RuleJudgeConfig
from past_ray.engine.judge import RuleJudge
from past_ray.engine.model_cache import cached_base
from past_ray.envs.chat import chat_codec
from past_ray.envs.closed_book_qa import JudgedQA
from past_ray.pipelines.data import GIVEN, QUESTIONS, Domain, load_domain
from past_ray.pipelines.progress import ProgressDisplay
from past_ray.pipelines.stages import SCALE_CHOICE, RunDirectory, Stage, StageResult
from past_ray.pipelines.tracking import open_trackers
from past_ray.runtime.adapter_answers import AdapterAnswers
from past_ray.runtime.cluster import cluster_supply
from past_ray.runtime.judge_actor import start_judge
from past_ray.runtime.placement import fits_together
from past_ray.runtime.session import RLSession
from past_ray.tasks.examples import QAExample
from past_ray.tasks.judging import Judge

ResultT = TypeVar("ResultT")

MAX_LORAS = 8
"""Adapters that one engine decodes together."""

logger = logging.getLogger(__name__)


class Laboratory(AbstractContextManager["Laboratory"]):
    """Holds what stages share: the run directory, the open RL session and the display."""

    def __init__(self, config: ExperimentConfig, progress: ProgressDisplay) -> None:
        self.config = config
        self.run = RunDirectory(config.run_dir)
        self._progress = progress
        self._runner = asyncio.Runner()
        self._session: RLSession | None = None
        self._answers: AdapterAnswers | None = None
        self._judge: Judge | None = None
        self._num_versions = 0
        self._trackers = open_trackers(config.tracking, config.run_dir, name=config.name)
        self._stage = ""

    def __exit__(self, *_: object) -> None:
        """End all actors."""
        self._trackers.close()
        self.close_engines()
        self._runner.close()

    def execute(self, stages: Iterable[Stage]) -> None:
        """Run every stage that has not finished before."""
        for stage in stages:
            self._stage = stage.name
            with self._progress.stage(stage.name, stage.num_steps):
                self.run.run(stage.name, stage.work)

    def result(self, stage: str) -> StageResult:
        """What a stage that has run returned."""
        record = self.run.finished(stage)
        assert record is not None, f"stage {stage} has not run"
        return record

    def run_async(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine in the event loop that the actors belong to."""
        return self._runner.run(work)

    def domain(self, name: str, *, questions: str = QUESTIONS, texts: str | None = GIVEN) -> Domain:
        """Tables of the domain ``name``, with the texts that ``texts`` wrote."""
        return load_domain(self.config.task, self.run, name, questions=questions, texts=texts)

    def model(self, name: str) -> Path:
        """Folder of the model ``name``; ``base`` may be cached, ``adapted`` is the product."""
        if name == "base":
            return cached_base(self.config.model)
        return self.run.root / name if name == "adapted" else self.run.model(name)

    def skill_scale(self) -> float:
        """Lambda of the run, as configured or as chosen on the validation domain."""
        if self.config.skill_scale is not None:
            return self.config.skill_scale
        return float(self.result(SCALE_CHOICE)["scale"])

    def judge(self) -> Judge:
        """The judge of the run; a model or an endpoint gets an actor with the first call."""
        if self._judge is None:
            config = self.config.judged_by
            self._judge = (
                RuleJudge(config)
                if isinstance(config, RuleJudgeConfig)
                else start_judge(
                    config,
                    timeout_s=self.config.rl.reward_timeout_s,
                    num_cpus=self.config.runtime.cpus_per_generator,
                )
            )
        return self._judge

    def session(self) -> RLSession:
        """The open RL session; the first call opens it, and ends the adapters' engines."""
        if self._session is None:
            self.close_answers()
            session = RLSession(
                self.config.runtime,
                self.config.rl,
                model_folder=self.model("base"),
                make_env=JudgedQA(self.judge()),
            )
            self._session = session
            self._runner.run(session.open())
        return self._session

    def answers(self) -> AdapterAnswers:
        """Open engines that answer with adapters; the first call ends the RL session."""
        config = self.config.single_passage
        assert config is not None, "adapters are for runs with single_passage"
        if self._answers is None:
            self.close_session()
            self._answers = AdapterAnswers(
                self.config.runtime,
                self.model("base"),
                max_rank=config.lora.rank,
                max_loras=MAX_LORAS,
            )
        return self._answers

    def close_engines(self) -> None:
        """End all actors but the judge's, before a stage that needs their memory."""
        self.close_session()
        self.close_answers()

    def close_answers(self) -> None:
        """End the adapters' engines, if any."""
        if self._answers is not None:
            self._answers.close()
            self._answers = None

    def close_session(self) -> None:
        """End the RL actors, if any."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def next_version(self) -> int:
        """A version that no weights of this process had yet."""
        self._num_versions += 1
        return self._num_versions

    def make_room_for_sft(self) -> None:
        """End the RL actors where the cluster does not hold them beside SFT workers."""
        self.close_answers()
        if self._session and not fits_together(self.config.runtime, cluster_supply()):
            logger.info("ending the RL actors: the cluster does not hold them and an SFT stage")
            self.close_session()

    def on_sft_step(self, row: Mapping[str, float]) -> None:
        """Show and track a step; SFT counts them from 0."""
        tokens_per_s = row["tokens"] / row["seconds"]
        self._on_step(int(row["step"]) + 1, {**row, "tokens_per_s": tokens_per_s})

    def on_rl_step(self, row: Mapping[str, float]) -> None:
        """Show and track a step."""
        self._on_step(int(row["step"]), row)

    def _on_step(self, step: int, row: Mapping[str, float]) -> None:
        self._progress.step(step, row)
        self._trackers.log(row, step=step, stage=self._stage)

    def show_step(self, step: int, row: Mapping[str, Any]) -> None:
        """Move the stage's progress bar."""
        self._progress.step(step, row)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """theta_base's, which every model of the run has."""
        return AutoTokenizer.from_pretrained(self.model("base"))

    def prompt_ids(self, examples: Sequence[QAExample]) -> list[list[int]]:
        """Prompts as the generators get them."""
        codec = chat_codec(self.tokenizer())
        return [codec.render(list(example.messages)) for example in examples]
