"""The content of ``report.json``, for one run and for several seeds of it.

Accuracies, intervals and fractions are in [0, 1], times in seconds. Keys that a run has nothing
for are absent. In the report of several seeds, numbers are means over the seeds, ``ci95`` is
their range and ``per_seed`` holds each seed's own.
"""

from typing import NotRequired, TypedDict


class ArmResult(TypedDict):
    """One arm's evaluation on the held-out target questions."""

    accuracy: float
    ci95: list[float]
    answer_tokens: float
    seconds: float
    seconds_per_new_target: NotRequired[float]
    """What is paid again for every target, the skill being there already."""
    truncated_frac: NotRequired[float]
    accuracy_by_kind: NotRequired[dict[str, float]]
    judge_failures: NotRequired[int]
    """Answers that nobody graded; they are left out of the accuracy."""


class ScalePoint(TypedDict):
    """Accuracy of ``theta_target + scale * v``."""

    scale: float
    accuracy: float
    ci95: NotRequired[list[float]]


class DosePoint(TypedDict):
    """Accuracy after ``sft_steps`` of target SFT, without and with the skill vector."""

    sft_steps: int
    target_sft: float
    past: float


class CosineEntry(TypedDict):
    """One cell of the heat map; ``cosine`` is None where an update is zero."""

    layer: int | None
    module: str
    cosine: float | None


class WeightSync(TypedDict):
    """How well and how fast new weights reached the generators."""

    max_logprob_gap: float
    median_seconds: float
    num_syncs: NotRequired[int]


class RLStep(TypedDict):
    """One optimizer step of GRPO."""

    step: int
    reward: float
    entropy: NotRequired[float | None]
    ref_kl: NotRequired[float | None]
    grad_norm: NotRequired[float | None]
    seconds: NotRequired[float]
    tokens_per_s: NotRequired[float]


class Training(TypedDict):
    """Curves by stage name."""

    sft: NotRequired[dict[str, list[float]]]
    rl: NotRequired[dict[str, list[RLStep]]]


class ExampleAnswers(TypedDict):
    """What every arm answered to one held-out question."""

    question: str
    gold: str
    answers: dict[str, str]


class PaperRow(TypedDict):
    """One line beside the paper, as text."""

    method: str
    ours: str
    gain: str
    mean_words: str
    published: str
    note: str


class PaperSection(TypedDict):
    """The run in the layout of the paper's table."""

    title: str
    rows: list[PaperRow]
    footnotes: list[str]
    differences: list[str]
    text: NotRequired[str]
    """The table for a terminal."""


class ScaleChosen(TypedDict):
    """The scale that was chosen on the validation domain."""

    scale: float
    accuracy: float
    best_scale: float
    reason: str


class Ability(TypedDict):
    """Accuracy of one ability and its interval."""

    accuracy: float
    ci95: list[float]


class HeldOutResult(TypedDict):
    """One model on a domain that the run does not train."""

    perplexity: float | None
    next_token_accuracy: float
    tokens_read: int
    tokens_scored: int
    in_context: Ability
    """Questions whose passage is in the prompt."""


class Forgetting(TypedDict):
    """What injection cost outside of all domains."""

    before: HeldOutResult
    after: HeldOutResult


class DiagnosticResult(TypedDict):
    """``tasks.diagnostics.DiagnosticFigures`` of one model."""

    empty_frac: float
    mean_words: float
    repetition_frac: float
    self_consistency: float | None
    perplexity: float | None


class DiagnosticSign(TypedDict):
    """One sign that the injected model degenerates."""

    sign: str
    message: str


class Diagnostics(TypedDict):
    """Sampled answers to the target's questions, without and with the skill vector."""

    before: DiagnosticResult
    after: DiagnosticResult
    warnings: list[DiagnosticSign]
    num_questions: int
    num_samples: int
    perplexity_note: NotRequired[str]
    """Why there is none."""


class TextCounts(TypedDict):
    """What theta_base wrote about the passages of some domains."""

    texts: int
    empty: int
    truncated: int


class SeedResult(TypedDict):
    """What the report of several seeds keeps of each."""

    arms: dict[str, ArmResult]
    cosines: NotRequired[dict[str, float | None]]


class Report(TypedDict):
    """The whole report."""

    name: str
    arms: dict[str, ArmResult]
    seed: NotRequired[int]
    created: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    git_commit: NotRequired[str | None]
    num_heldout_questions: NotRequired[int]
    scale_sweep: NotRequired[list[ScalePoint]]
    dose_curve: NotRequired[list[DosePoint]]
    cosines: NotRequired[dict[str, float | None]]
    cosine_modules: NotRequired[dict[str, list[CosineEntry]]]
    weight_sync: NotRequired[WeightSync]
    training: NotRequired[Training]
    stage_seconds: NotRequired[dict[str, float]]
    answers: NotRequired[list[ExampleAnswers]]
    paper: NotRequired[PaperSection]
    scale_choice: NotRequired[ScaleChosen]
    forgetting: NotRequired[Forgetting]
    diagnostics: NotRequired[Diagnostics]
    texts_source: NotRequired[TextCounts]
    texts_target: NotRequired[TextCounts]
    config: NotRequired[str]
    """The resolved configuration as YAML."""
    per_seed: NotRequired[dict[str, SeedResult]]
