"""One whole PaST experiment: data, model, both training stages, the arms and where they run."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from past_ray.config.base import StrictConfig
from past_ray.config.judge import JudgeConfig, RuleJudgeConfig
from past_ray.config.model import (
    CheckpointModelConfig,
    HubModelConfig,
    ModelConfig,
    ScratchModelConfig,
)
from past_ray.config.rl import RLConfig
from past_ray.config.runtime import RuntimeConfig
from past_ray.config.seal import SealConfig
from past_ray.config.serving import ServingConfig
from past_ray.config.sft import SFTConfig
from past_ray.config.single_passage import SinglePassageConfig
from past_ray.config.task import TaskConfig, WorldTaskConfig
from past_ray.config.texts import PassageTextsConfig, WindowTextsConfig
from past_ray.config.tracking import TrackingConfig

ArmName = Literal[
    "base",
    "in_context",
    "passage_only",
    "target_sft",
    "seal",
    "sequential",
    "pre_injection",
    "past",
    "past_two_rounds",
    "target_rl",
]
"""What is compared; `docs/algorithm.md` defines each arm by its equation."""


class EvaluationConfig(StrictConfig):
    """One greedy decoding setting and one token cap for every arm."""

    max_new_tokens: int = Field(default=8, ge=1)
    """Token cap of an answer. A longer cap favours longer answers, so all arms share it."""

    scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    """Scales of the injection sweep; empty for none."""

    dose_steps: tuple[int, ...] = ()
    """Lengths of further target SFT runs, each evaluated with and without the skill vector."""

    num_bootstrap: int = Field(default=2000, ge=100)
    """Resamples behind a 95 % confidence interval."""

    num_example_answers: int = Field(default=12, ge=0)
    """Held-out questions whose answers are shown in the report, for every arm."""

    num_diagnostic_samples: int = Field(default=0, ge=0)
    """Answers sampled per target question, without and with the skill vector, to see whether it
    broke the model; no label is used. 0 is off; agreement of answers needs 2."""


class ExperimentConfig(StrictConfig):
    """One run of the whole method."""

    name: str = "past"
    """Title of the report."""

    run_dir: Path = Path("runs/past")
    """Everything the run writes. The same command continues an interrupted run there."""

    seed: int = 0
    """Seed of populations, orders and sampling; the scratch base has its own."""

    task: TaskConfig = WorldTaskConfig()
    """Documents and questions."""

    model: ModelConfig = ScratchModelConfig()
    """theta_base."""

    texts: Annotated[PassageTextsConfig | WindowTextsConfig, Field(discriminator="kind")] | None = (
        None
    )
    """What theta_base writes about every passage before SFT; None: texts given with the task."""

    judge: JudgeConfig | None = None
    """Rewards rollouts and grades every arm. None: exact match in the miniature world, and
    elsewhere gold-token recall from 0.67 on over the first 48 words."""

    sft: SFTConfig = SFTConfig()
    """Source and target SFT: one recipe for both, so that what they share cancels."""

    sft_pairs: SFTConfig | None = None
    """Second phase of source and target SFT, on questions with answers that theta_base wrote about
    windows; None: one phase. The length of an answer's prompt counts towards ``max_length``."""

    single_passage: SinglePassageConfig | None = None
    """Learn each target passage in a LoRA adapter of its own (n=1) instead of one SFT of all."""

    seal: SealConfig = SealConfig()
    """Search of arm ``seal`` for its writer, on the source passages and questions."""

    rl: RLConfig = RLConfig()
    """GRPO on the source questions."""

    arms: tuple[ArmName, ...] = ("base", "target_sft", "past")
    """Arms to train and evaluate."""

    skill_scale: float | None = 1.0
    """lambda in ``theta_final = theta_target + lambda * v``; the paper uses 1 throughout. null
    chooses among ``evaluation.scales`` on ``task.validation``, so without labels of the target."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """How arms are compared."""

    runtime: RuntimeConfig = RuntimeConfig()
    """Processes and placement."""

    serving: ServingConfig = ServingConfig()
    """The endpoint of the adapted model."""

    tracking: TrackingConfig = TrackingConfig()
    """Services that get the metrics."""

    @property
    def judged_by(self) -> JudgeConfig:
        """The judge, whether configured or not."""
        if self.judge is not None:
            return self.judge
        if self.task.kind == "world":
            return RuleJudgeConfig(rule="exact_match", correct_at=1.0, max_words=None)
        return RuleJudgeConfig()

    @property
    def num_rounds(self) -> int:
        """Refinement rounds that some arm needs."""
        return 2 if "past_two_rounds" in self.arms else 1

    @property
    def steps_per_round(self) -> int:
        """RL steps of each of two refinement rounds; one round alone takes them all."""
        return self.rl.num_steps // 2

    @model_validator(mode="after")
    def _check(self) -> "ExperimentConfig":
        for key, recipe in {"sft": self.sft, "sft_pairs": self.sft_pairs}.items():
            if recipe and recipe.batch_size % self.runtime.num_sft_workers:
                raise ValueError(
                    f"{key}.batch_size must be a multiple of runtime.num_sft_workers, got "
                    f"{recipe.batch_size} over {self.runtime.num_sft_workers}. Uneven ranks would "
                    "wait for each other forever."
                )
        if isinstance(self.model, ScratchModelConfig) and self.task.kind != "world":
            raise ValueError(
                "model.kind scratch knows only the miniature world, got task.kind "
                f"{self.task.kind}. Use model.kind checkpoint, hub or wheel."
            )
        is_others = isinstance(self.model, CheckpointModelConfig | HubModelConfig)
        if is_others and self.task.kind == "world":
            raise ValueError(
                "task.kind world needs model.kind scratch: other models do not know its words."
            )
        self._check_arms()
        if "seal" in self.arms:
            self._check_seal()
        self._check_windows()
        if self.skill_scale is None:
            self._check_scale_choice()
        if self.rl.max_new_tokens >= self.runtime.generator.max_model_len:
            raise ValueError(
                "rl.max_new_tokens must be below runtime.generator.max_model_len, got "
                f"{self.rl.max_new_tokens} and {self.runtime.generator.max_model_len}."
            )
        return self

    def _check_seal(self) -> None:
        if not (self.single_passage and isinstance(self.texts, PassageTextsConfig)):
            raise ValueError(
                "arm seal needs single_passage, for the adapters that score self-edits, and texts "
                "of kind passages, which says how they are sampled. Add them or drop the arm."
            )
        if self.texts.temperature == 0:
            raise ValueError(
                "arm seal needs texts.temperature above 0, got 0: all self-edits about a passage "
                "would be equal. Raise it or drop the arm."
            )
        if self.seal.sft.batch_size % self.runtime.num_sft_workers:
            raise ValueError(
                "seal.sft.batch_size must be a multiple of runtime.num_sft_workers, got "
                f"{self.seal.sft.batch_size} over {self.runtime.num_sft_workers}. Change one."
            )

    def _check_scale_choice(self) -> None:
        if getattr(self.task, "validation", None) is None:
            raise ValueError(
                "skill_scale null needs task.validation, a further source domain to choose it on. "
                "Add one, or give a number; the paper uses 1."
            )
        if not self.evaluation.scales:
            raise ValueError("skill_scale null needs evaluation.scales to choose from, got none.")

    def _check_windows(self) -> None:
        if not isinstance(self.texts, WindowTextsConfig):
            if self.sft_pairs:
                raise ValueError(
                    "sft_pairs needs texts.kind windows, which writes the questions, got "
                    f"{self.texts.kind if self.texts else None}. Add it or drop sft_pairs."
                )
        elif self.single_passage or self.evaluation.dose_steps:
            raise ValueError(
                "texts.kind windows trains one model over all documents in one length; "
                "single_passage and evaluation.dose_steps do not go with it. Drop them."
            )

    def _check_arms(self) -> None:
        is_world = self.task.kind == "world"
        if is_world and (self.texts or self.single_passage or "passage_only" in self.arms):
            raise ValueError(
                "texts, single_passage and arm passage_only need another task.kind than world: "
                "the miniature world's documents are all there is to write. Drop them."
            )
        if self.single_passage and self.evaluation.dose_steps:
            raise ValueError(
                "evaluation.dose_steps must be empty with single_passage, got "
                f"{list(self.evaluation.dose_steps)}: there is no target SFT to vary. Drop them."
            )
        if "target_rl" in self.arms and not is_world:
            raise ValueError(
                "arm target_rl needs target questions that nobody is evaluated on, which only "
                f"task.kind world has, got {self.task.kind}. Drop the arm."
            )
        if "in_context" in self.arms and is_world:
            raise ValueError(
                "arm in_context needs task.kind squad or tables: the miniature world's model has "
                "no words for its prompt. Drop the arm."
            )
        if "past_two_rounds" in self.arms and self.rl.num_steps % 2:
            raise ValueError(
                "rl.num_steps must be even to be shared by two refinement rounds, got "
                f"{self.rl.num_steps}. Use {self.rl.num_steps + 1} or drop arm past_two_rounds."
            )
