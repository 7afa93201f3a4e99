"""One stage of a plan -> its estimate: which formulas apply to which kind of stage."""

from dataclasses import dataclass

from past_ray.config.plan import GPUS, HardwareConfig, ModelShape
from past_ray.config.plan_stages import (
    EvaluationPlan,
    RLPlan,
    SealPlan,
    SFTPlan,
    SinglePassagePlan,
    StagePlan,
    TextGenerationPlan,
)
from past_ray.config.sft import LoraConfig
from past_ray.pipelines.estimates import (
    BF16,
    adapter_seconds,
    forward_flops,
    generation_memory,
    generation_seconds,
    lora_parameters,
    training_flops,
    training_memory,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """What one stage needs."""

    name: str
    """Name of the stage."""

    num_gpus: int
    """GPUs that work at the same time."""

    memory_bytes: float
    """Peak of one GPU; where two kinds of process share or alternate, of the larger."""

    num_steps: int
    """Optimizer steps; 0 without training."""

    num_tokens: int
    """Tokens read, written or trained on, once for each epoch."""

    judge_calls: int
    """Answers that a judge grades."""

    seconds: float
    """Wall-clock time without starts, checkpoints and the judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one GPU reaches."""

    flops_per_s: float
    """Operations per second in training and reading."""

    bytes_per_s: float
    """Bytes per second in decoding."""


def estimate_stage(stage: StagePlan, shape: ModelShape, hardware: HardwareConfig) -> StageEstimate:
    """Apply the formulas of the stage's kind."""
    gpu = GPUS[hardware.gpu]
    rates = Rates(
        flops_per_s=gpu.peak_flops * hardware.flops_utilization,
        bytes_per_s=gpu.bandwidth * hardware.bandwidth_utilization,
    )
    match stage:
        case TextGenerationPlan():
            return _text_generation(stage, shape, rates)
        case SFTPlan():
            return _sft(stage, shape, rates)
        case SinglePassagePlan():
            return _single_passage(stage, shape, rates)
        case RLPlan():
            return _rl(stage, shape, rates)
        case SealPlan():
            return _seal(stage, shape, rates)
        case EvaluationPlan():
            return _evaluation(stage, shape, rates)


def rl_step_seconds(stage: RLPlan, shape: ModelShape, rates: Rates) -> tuple[float, float]:
    """Return the generation and the training of one step, which follow one another.

    Training is forward and backward on every token of every rollout, and with a KL penalty one
    forward pass of the reference.
    """
    generation = generation_seconds(
        shape,
        num_sequences=stage.rollouts_per_step,
        prompt_tokens=stage.prompt_tokens,
        new_tokens=stage.new_tokens,
        num_engines=stage.num_gpus,
        tensor_parallel=1,
        flops_per_s=rates.flops_per_s,
        bytes_per_s=rates.bytes_per_s,
    )
    length = stage.prompt_tokens + stage.new_tokens
    num_tokens = stage.rollouts_per_step * length
    flops = training_flops(
        shape,
        num_tokens=num_tokens,
        sequence_tokens=length,
        is_lora=False,
        gradient_checkpointing=stage.gradient_checkpointing,
    )
    if stage.kl_coefficient > 0:
        flops += forward_flops(shape, num_tokens=num_tokens, sequence_tokens=length)
    return generation, flops / (rates.flops_per_s * stage.num_gpus)


def _text_generation(stage: TextGenerationPlan, shape: ModelShape, rates: Rates) -> StageEstimate:
    num_texts = stage.num_documents * stage.per_document
    return _generation(stage, shape, rates, num_sequences=num_texts, judge_calls=0)


def _evaluation(stage: EvaluationPlan, shape: ModelShape, rates: Rates) -> StageEstimate:
    num_answers = stage.num_questions * stage.repeats
    judge_calls = num_answers if stage.judge else 0
    return _generation(stage, shape, rates, num_sequences=num_answers, judge_calls=judge_calls)


def _generation(
    stage: TextGenerationPlan | EvaluationPlan,
    shape: ModelShape,
    rates: Rates,
    *,
    num_sequences: int,
    judge_calls: int,
) -> StageEstimate:
    length = stage.prompt_tokens + stage.new_tokens
    num_engines = stage.num_gpus // stage.tensor_parallel
    return StageEstimate(
        name=stage.name,
        num_gpus=stage.num_gpus,
        memory_bytes=generation_memory(
            shape,
            tensor_parallel=stage.tensor_parallel,
            num_sequences=-(-num_sequences // num_engines),
            sequence_tokens=length,
        ),
        num_steps=0,
        num_tokens=num_sequences * length,
        judge_calls=judge_calls,
        seconds=generation_seconds(
            shape,
            num_sequences=num_sequences,
            prompt_tokens=stage.prompt_tokens,
            new_tokens=stage.new_tokens,
            num_engines=num_engines,
            tensor_parallel=stage.tensor_parallel,
            flops_per_s=rates.flops_per_s,
            bytes_per_s=rates.bytes_per_s,
        ),
    )


def _sft(stage: SFTPlan, shape: ModelShape, rates: Rates) -> StageEstimate:
    num_tokens = stage.epochs * stage.num_sequences * stage.sequence_tokens
    flops = training_flops(
        shape,
        num_tokens=num_tokens,
        sequence_tokens=stage.sequence_tokens,
        is_lora=stage.lora is not None,
        gradient_checkpointing=stage.gradient_checkpointing,
    )
    micro_batch_tokens = stage.micro_batch_size * stage.max_length
    memory = training_memory(
        shape,
        num_ranks=stage.num_gpus,
        num_tokens=micro_batch_tokens,
        num_logits=micro_batch_tokens,
        gradient_checkpointing=stage.gradient_checkpointing,
        num_adapter_parameters=_adapter_parameters(shape, stage.lora) if stage.lora else None,
    )
    return StageEstimate(
        name=stage.name,
        num_gpus=stage.num_gpus,
        memory_bytes=memory.total,
        num_steps=stage.num_steps,
        num_tokens=num_tokens,
        judge_calls=0,
        seconds=flops / (rates.flops_per_s * stage.num_gpus),
    )


def _single_passage(stage: SinglePassagePlan, shape: ModelShape, rates: Rates) -> StageEstimate:
    steps = stage.epochs * stage.sequences_per_passage
    waves = -(-stage.num_passages // stage.num_gpus)
    return StageEstimate(
        name=stage.name,
        num_gpus=stage.num_gpus,
        memory_bytes=_adapter_memory(shape, stage.lora, num_tokens=stage.max_length),
        num_steps=stage.num_passages * steps,
        num_tokens=stage.num_passages * steps * stage.sequence_tokens,
        judge_calls=0,
        seconds=waves
        * adapter_seconds(
            shape,
            num_sequences=steps,
            sequence_tokens=stage.sequence_tokens,
            flops_per_s=rates.flops_per_s,
            bytes_per_s=rates.bytes_per_s,
        ),
    )


def _rl(stage: RLPlan, shape: ModelShape, rates: Rates) -> StageEstimate:
    length = stage.max_prompt_tokens + stage.max_new_tokens
    learner = training_memory(
        shape,
        num_ranks=stage.num_gpus,
        num_tokens=stage.micro_batch_size * length,
        num_logits=stage.micro_batch_size * stage.max_new_tokens,
        gradient_checkpointing=stage.gradient_checkpointing,
        has_reference=stage.kl_coefficient > 0,
    )
    generator = generation_memory(
        shape,
        tensor_parallel=1,
        num_sequences=-(-stage.rollouts_per_step // stage.num_gpus),
        sequence_tokens=length,
    )
    num_rollouts = stage.num_steps * stage.rollouts_per_step
    return StageEstimate(
        name=stage.name,
        num_gpus=stage.num_gpus,
        # The learner's state stays while the generator works; the rest of each makes way.
        memory_bytes=learner.state + max(learner.total - learner.state, generator),
        num_steps=stage.num_steps,
        num_tokens=num_rollouts * (stage.prompt_tokens + stage.new_tokens),
        judge_calls=num_rollouts if stage.judge else 0,
        seconds=stage.num_steps * sum(rl_step_seconds(stage, shape, rates)),
    )


def _seal(stage: SealPlan, shape: ModelShape, rates: Rates) -> StageEstimate:
    steps = stage.epochs * stage.sequences_per_run
    training = adapter_seconds(
        shape,
        num_sequences=steps,
        sequence_tokens=stage.sequence_tokens,
        flops_per_s=rates.flops_per_s,
        bytes_per_s=rates.bytes_per_s,
    )
    # A handful of questions: as many decoding steps as the longest answer has tokens.
    answering = generation_seconds(
        shape,
        num_sequences=round(stage.questions_per_context),
        prompt_tokens=0,
        new_tokens=stage.answer_tokens,
        num_engines=1,
        tensor_parallel=1,
        flops_per_s=rates.flops_per_s,
        bytes_per_s=rates.bytes_per_s,
    )
    return StageEstimate(
        name=stage.name,
        num_gpus=stage.num_gpus,
        memory_bytes=_adapter_memory(shape, stage.lora, num_tokens=stage.sequence_tokens),
        num_steps=stage.num_runs * steps,
        num_tokens=stage.num_runs * steps * stage.sequence_tokens,
        judge_calls=round(stage.num_runs * stage.questions_per_context),
        seconds=stage.num_runs * (training + answering) / (stage.num_gpus // 2),
    )


def _adapter_parameters(shape: ModelShape, lora: LoraConfig) -> int:
    return lora_parameters(shape, rank=lora.rank, target_modules=lora.target_modules)


def _adapter_memory(shape: ModelShape, lora: LoraConfig, *, num_tokens: int) -> float:
    """Return the memory of training one adapter on a bf16 base, one sequence at a time."""
    return training_memory(
        shape,
        num_ranks=1,
        num_tokens=num_tokens,
        num_logits=num_tokens,
        gradient_checkpointing=False,
        num_adapter_parameters=_adapter_parameters(shape, lora),
        frozen_bytes=BF16,
    ).total
