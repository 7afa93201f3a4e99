"""Numbers that the PaST paper and SEAL publish, to print beside our own.

All figures are percent, as printed. Where the PaST paper prints a row of SEAL's, it is taken from
there.

Reference:
    PaST https://arxiv.org/abs/2601.11258 Tables 1, 2, 3 and 5; SEAL
    https://arxiv.org/abs/2506.10943.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Regime = Literal["single_passage", "cpt_200", "cpt_2067", "loogle"]
"""How knowledge enters the target: an adapter per passage, all weights over many, documents."""

REGIME_TITLES: Mapping[Regime, str] = {
    "single_passage": "SQuAD, single passage, adapter per passage (n=1)",
    "cpt_200": "SQuAD, continued pretraining on 200 passages (n=200)",
    "cpt_2067": "SQuAD, continued pretraining on 2067 passages (n=2067)",
    "loogle": "LooGLE, short-dependency questions on long documents",
}
"""Titles of the tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFigure:
    """One number of a paper."""

    percent: float
    """Accuracy as printed."""

    source: str
    """Where it is printed."""

    target_sft: float
    """Accuracy of target SFT in the same table; the difference to it is the printed gain."""

    remark: str = ""
    """What differs from the other rows of its regime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What accuracies depend on beside the method; None where it is not published or not known."""

    model: str
    """Name of theta_base, without an organisation."""

    judge: str
    """What decides that an answer is correct."""

    num_passages: int | None
    """Target passages or documents."""

    num_questions: int | None
    """Questions about them."""

    source_size: int | None
    """Source passages or documents of one round of RL."""


METHODS: Mapping[str, str] = {
    "base": "Base",
    "passage_only": "Train on Passage",
    "target_sft": "Passage + Synthetic (target SFT)",
    "passage_gpt": "Passage + GPT-4.1 Synthetic",
    "seal_one_round": "SEAL, one round",
    "seal": "SEAL",
    "sequential": "Sequential fine-tuning",
    "pre_injection": "Pre-injection",
    "past": "PaST, one round",
    "past_twice_the_data": "PaST, one round on twice the data",
    "past_two_rounds": "PaST, two rounds",
    "in_context": "Base, passage in the prompt",
}
"""Arms in the paper's order, with their names; the last is a ceiling that is not in the paper."""

_SQUAD_REGIMES: tuple[Regime, Regime, Regime] = ("single_passage", "cpt_200", "cpt_2067")

SQUAD: Mapping[str, tuple[float, float, float]] = {
    "base": (32.7, 32.7, 29.0),
    "passage_only": (33.5, 36.0, 31.2),
    "target_sft": (39.7, 50.6, 43.4),
    "passage_gpt": (46.3, 59.4, 49.2),
    "seal": (47.0, 58.2, 46.4),
    "past": (50.8, 58.9, 47.4),
    "past_two_rounds": (56.9, 58.7, 49.2),
}
"""Table 1: n = 1, 200, 2067."""

MORE_DATA: tuple[float, float, float] = (49.9, 58.3, 47.1)
"""Table 3: one round on 100 passages; its other rows are those of Table 1."""

LOOGLE: Mapping[str, float] = {"target_sft": 30.1, "past": 35.0, "past_two_rounds": 38.1}
"""Table 2: test documents 0 to 49."""

INJECTION: Mapping[str, float] = {
    "target_sft": 32.9,
    "sequential": 30.3,
    "pre_injection": 36.5,
    "past": 44.6,
}
"""Table 5: where the skill goes in, LooGLE test documents 0 to 9."""

SEAL_ROUNDS: tuple[float, float, float] = (39.7, 43.7, 47.0)
"""SEAL on single passages after 0, 1 and 2 rounds of its outer loop."""

SEAL_PROMPTS: Mapping[str, float] = {
    "implications": 39.7,
    "implications-long": 49.3,
    "implications-very-long": 45.0,
    "rewrite": 49.4,
    "self-qa": 37.3,
}
"""SEAL on single passages without its outer loop, by the prompt that asks for the training text."""

_SQUAD_MODEL, _JUDGE = "Qwen2.5-7B", "GPT-4.1"

PAPER_SETUPS: Mapping[Regime, Setup] = {
    # SEAL's evaluation passages; equal accuracies of the base model say that n=1 has the same.
    "single_passage": Setup(
        model=_SQUAD_MODEL, judge=_JUDGE, num_passages=200, num_questions=974, source_size=50
    ),
    "cpt_200": Setup(
        model=_SQUAD_MODEL, judge=_JUDGE, num_passages=200, num_questions=974, source_size=50
    ),
    "cpt_2067": Setup(
        model=_SQUAD_MODEL, judge=_JUDGE, num_passages=2067, num_questions=10_570, source_size=50
    ),
    "loogle": Setup(
        model="Qwen2.5-7B-Instruct",
        judge=_JUDGE,
        num_passages=50,
        num_questions=None,
        source_size=5,
    ),
}
"""How the published numbers were measured."""


def published(regime: Regime) -> dict[str, PublishedFigure]:
    """Return what is published for a regime, by arm."""
    return _loogle() if regime == "loogle" else _squad(_SQUAD_REGIMES.index(regime))


def _squad(column: int) -> dict[str, PublishedFigure]:
    target_sft = SQUAD["target_sft"][column]

    def figure(percent: float, source: str, remark: str = "") -> PublishedFigure:
        return PublishedFigure(percent=percent, source=source, target_sft=target_sft, remark=remark)

    figures = {arm: figure(row[column], "Table 1") for arm, row in SQUAD.items()}
    figures["past_twice_the_data"] = figure(MORE_DATA[column], "Table 3")
    if column == 0:
        best = max(SEAL_PROMPTS, key=lambda prompt: SEAL_PROMPTS[prompt])
        figures["seal_one_round"] = figure(SEAL_ROUNDS[1], "SEAL")
        figures["seal"] = figure(
            SQUAD["seal"][0],
            "Table 1",
            f"prompt {best!r} without SEAL's training: {SEAL_PROMPTS[best]}",
        )
    return figures


def _loogle() -> dict[str, PublishedFigure]:
    figures = {
        arm: PublishedFigure(percent=percent, source="Table 2", target_sft=LOOGLE["target_sft"])
        for arm, percent in LOOGLE.items()
    }
    remark = f"on 10 documents, where PaST has {INJECTION['past']}"
    return figures | {
        arm: PublishedFigure(
            percent=INJECTION[arm],
            source="Table 5",
            target_sft=INJECTION["target_sft"],
            remark=remark,
        )
        for arm in ("sequential", "pre_injection")
    }
