"""The stages of a run on paper. Means decide the time, maxima decide the memory."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from past_ray.config.base import StrictConfig
from past_ray.config.sft import LoraConfig, Schedule


class _StagePlan(StrictConfig):
    """What every stage has."""

    name: str
    """Unique name."""

    num_gpus: PositiveInt
    """GPUs of the stage, which share its work."""


class _GenerationPlan(_StagePlan):
    """What stages have that only generate."""

    tensor_parallel: PositiveInt = 1
    """GPUs that share one copy of the model."""

    @model_validator(mode="after")
    def _check_copies(self) -> Self:
        if self.num_gpus % self.tensor_parallel:
            found = f"got {self.num_gpus} and {self.tensor_parallel}. Some GPUs would idle."
            raise ValueError(f"num_gpus must be a multiple of tensor_parallel, {found}")
        return self


class TextGenerationPlan(_GenerationPlan):
    """The model writes texts about documents."""

    kind: Literal["text_generation"]
    """Selects this stage."""

    num_documents: PositiveInt
    """Documents."""

    per_document: PositiveInt
    """Texts about each."""

    prompt_tokens: PositiveInt
    """Mean prompt."""

    new_tokens: PositiveInt
    """Mean text."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature."""


class SFTPlan(_StagePlan):
    """Supervised fine-tuning of all weights, or of an adapter."""

    kind: Literal["sft"]
    """Selects this stage."""

    num_sequences: PositiveInt
    """Sequences of one epoch."""

    sequence_tokens: PositiveInt
    """Mean sequence."""

    max_length: PositiveInt
    """Longest sequence; memory is planned for micro-batches of these."""

    epochs: PositiveInt
    """Passes over the sequences."""

    batch_size: PositiveInt
    """Sequences of one optimizer step, over all GPUs."""

    micro_batch_size: PositiveInt
    """Sequences of one forward pass of one GPU."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""

    schedule: Schedule
    """Decay of the learning rate."""

    gradient_checkpointing: bool = False
    """Activations are computed twice instead of kept."""

    lora: LoraConfig | None = None
    """Trains an adapter instead of all weights."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps; an incomplete last batch of an epoch is dropped."""
        return self.epochs * (self.num_sequences // self.batch_size)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % (self.num_gpus * self.micro_batch_size):
            found = f"got {self.batch_size} and {self.num_gpus} * {self.micro_batch_size}"
            raise ValueError(
                f"batch_size must be a multiple of num_gpus * micro_batch_size, {found}. "
                "Use a smaller micro-batch or fewer GPUs."
            )
        return self


class SinglePassagePlan(_StagePlan):
    """One adapter for each passage, trained one sequence at a time."""

    kind: Literal["single_passage"]
    """Selects this stage."""

    num_passages: PositiveInt
    """Passages, and so adapters."""

    sequences_per_passage: PositiveInt
    """Lines of the implications, and the passage."""

    sequence_tokens: PositiveInt
    """Mean sequence."""

    max_length: PositiveInt
    """Longest sequence; memory is planned for one of these."""

    epochs: PositiveInt
    """Passes over the sequences of a passage."""

    learning_rate: float = Field(gt=0)
    """Learning rate at the start."""

    schedule: Schedule
    """Decay of the learning rate."""

    lora: LoraConfig
    """The adapter."""


class RLPlan(_StagePlan):
    """GRPO with one reward for each rollout.

    Every GPU holds a rank of the learner and a generator, which sleeps while the learner trains.
    """

    kind: Literal["rl"]
    """Selects this stage."""

    num_prompts: PositiveInt
    """Questions of one epoch."""

    prompts_per_step: PositiveInt
    """Questions of one step."""

    group_size: int = Field(ge=2)
    """Rollouts per question."""

    epochs: PositiveInt
    """Passes over the questions."""

    stop_at_step: PositiveInt | None = None
    """Stops before the epochs do, where the published run took its checkpoint."""

    prompt_tokens: PositiveInt
    """Mean prompt."""

    new_tokens: PositiveInt
    """Mean completion."""

    max_prompt_tokens: PositiveInt
    """Longest prompt."""

    max_new_tokens: PositiveInt
    """Longest completion; memory is planned for these."""

    learning_rate: float = Field(gt=0)
    """Constant learning rate."""

    temperature: float = Field(gt=0)
    """Sampling temperature."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 is all tokens."""

    top_k: PositiveInt | None = None
    """Only the most likely tokens; None is all."""

    kl_coefficient: float = Field(ge=0)
    """Weight of the KL penalty; above 0 a reference scores every rollout."""

    micro_batch_size: PositiveInt
    """Rollouts of one forward pass of one GPU."""

    gradient_checkpointing: bool = False
    """Activations are computed twice instead of kept."""

    judge: bool
    """A judge grades every rollout."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps; an incomplete last step of an epoch is dropped."""
        steps = self.epochs * (self.num_prompts // self.prompts_per_step)
        return steps if self.stop_at_step is None else min(steps, self.stop_at_step)

    @property
    def rollouts_per_step(self) -> int:
        """Derived: ``prompts_per_step * group_size``."""
        return self.prompts_per_step * self.group_size

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_prompts < self.prompts_per_step:
            found = f"got {self.num_prompts} and {self.prompts_per_step}"
            raise ValueError(f"num_prompts must reach prompts_per_step, {found}: no step at all.")
        return self


class SealPlan(_StagePlan):
    """SEAL's search: an adapter for each self-edit. Of two GPUs one trains, one answers."""

    kind: Literal["seal"]
    """Selects this stage."""

    num_contexts: PositiveInt
    """Contexts of a round."""

    self_edits: PositiveInt
    """Self-edits of a context."""

    seeds: PositiveInt
    """Adapters for each self-edit."""

    rounds: PositiveInt
    """Rounds."""

    questions_per_context: float = Field(gt=0)
    """Mean questions that an adapter is judged by."""

    answer_tokens: PositiveInt
    """Longest answer, which the others wait for."""

    sequences_per_run: PositiveInt
    """Lines of a self-edit, and the passage."""

    sequence_tokens: PositiveInt
    """Mean sequence, padding included."""

    epochs: PositiveInt
    """Passes over the sequences of a run."""

    learning_rate: float = Field(gt=0)
    """Learning rate at the start."""

    lora: LoraConfig
    """The adapter."""

    @property
    def num_runs(self) -> int:
        """Adapters of all rounds."""
        return self.rounds * self.num_contexts * self.self_edits * self.seeds

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_gpus % 2:
            raise ValueError(f"num_gpus must be even, got {self.num_gpus}. Add or drop one.")
        return self


class EvaluationPlan(_GenerationPlan):
    """Questions answered by one model, and judged."""

    kind: Literal["evaluation"]
    """Selects this stage."""

    num_questions: PositiveInt
    """Questions."""

    repeats: PositiveInt
    """Answers to each."""

    prompt_tokens: PositiveInt
    """Mean prompt."""

    new_tokens: PositiveInt
    """Mean answer."""

    temperature: float = Field(ge=0)
    """Sampling temperature; 0 is greedy."""

    judge: bool
    """A judge grades every answer."""


StagePlan = Annotated[
    TextGenerationPlan | SFTPlan | SinglePassagePlan | RLPlan | SealPlan | EvaluationPlan,
    Field(discriminator="kind"),
]
