"""SEAL, the rival: a writer whose texts were chosen by what adapters learn from them.

Round ``r`` on the passages and questions of the source; ``W_0 = theta_base``::

    seal_r_texts      W_(r-1) writes k self-edits about every passage
    seal_r_adapters   an adapter on W_(r-1) for every self-edit and seed
    seal_r_scores     share of the passage's questions that each adapter answers correctly
    seal_r_writer     W_r = SFT(W_(r-1)) on prompt -> best self-edit of each passage

Then target SFT as in the other arms, with the last writer as writer and as model: ``texts_seal``
and ``seal``.

Reference: SEAL https://arxiv.org/abs/2506.10943 section 3 (ReST-EM over self-edits).

Differs from the paper: every round reads the same source passages, those of PaST's first round,
where SEAL takes new ones.
"""

from collections.abc import Iterator
from typing import Any

from past_ray.pipelines.answering import Knowledge
from past_ray.pipelines.data import TARGET
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.passages import adapters, write_texts
from past_ray.pipelines.self_edits import (
    PREFIX,
    edit_adapters,
    edit_scores,
    new_writer,
    self_edits,
    texts_config,
    writer_after,
)
from past_ray.pipelines.stages import Stage

SEAL = "seal"
"""Writer of the target's texts, and the adapters that learned them."""

PAST_STAGES = ("texts_source", "sft_source_1", "rl_source_1", "one_round")
"""What PaST does once for all targets, in one round."""


def seal_stages(lab: Laboratory) -> Iterator[Stage]:
    """The rounds, then texts and adapters of the target."""
    for r in _rounds(lab):
        yield self_edits(lab, r)
        yield edit_adapters(lab, r)
        yield edit_scores(lab, r)
        yield new_writer(lab, r)
    last = seal_knowledge(lab).model
    yield write_texts(
        lab, "texts_seal", texts_config(lab), writer=SEAL, model=last, domains=[TARGET]
    )
    yield adapters(lab, SEAL, init=last, domain=TARGET, texts=SEAL)


def seal_knowledge(lab: Laboratory) -> Knowledge:
    """What the arm answers with: the last writer, and an adapter on it per target passage."""
    return Knowledge(model=writer_after(lab.config.seal.num_rounds), adapters=SEAL)


def seal_figures(lab: Laboratory) -> dict[str, Any]:
    """``seal_rounds``, what each round chose, and ``seal_cost``, beside the cost of PaST.

    Both costs are those of what is done once for all targets, for PaST in one round of RL. Tokens
    of texts that came from the cache count, the seconds they took do not.
    """
    rounds = [lab.result(f"{PREFIX}{r}_scores") for r in _rounds(lab)]
    keys = ("num_passages", "num_tied", "unscored", "mean_score", "mean_best_score")
    return {
        "seal_rounds": [
            {key: scores[key] for key in (*keys, "judge_failures")} for scores in rounds
        ],
        "seal_cost": {"seal": _seal_cost(lab), "past": _past_cost(lab)},
    }


def _seal_cost(lab: Laboratory) -> dict[str, float]:
    def total(part: str, key: str) -> float:
        return sum(lab.result(f"{PREFIX}{r}_{part}")[key] for r in _rounds(lab))

    answer_tokens = total("scores", "new_tokens")
    seconds = lab.run.stage_seconds()
    return {
        "adapters_trained": total("adapters", "adapters"),
        "sampled_tokens": total("texts", "new_tokens") + answer_tokens,
        "answer_tokens": answer_tokens,
        "trained_tokens": total("adapters", "num_tokens") + total("writer", "num_tokens"),
        "cached_texts": total("texts", "cached"),
        "seconds": sum(value for stage, value in seconds.items() if stage.startswith(PREFIX)),
    }


def _past_cost(lab: Laboratory) -> dict[str, float]:
    texts, steps = lab.result("texts_source"), lab.result("rl_source_1")["metrics"]
    answer_tokens = sum(step["num_tokens"] for step in steps)
    learned_tokens = sum(step.get("num_loss_tokens", 0) for step in steps)
    seconds = lab.run.stage_seconds()
    return {
        "adapters_trained": 0,
        "sampled_tokens": texts["new_tokens"] + answer_tokens,
        "answer_tokens": answer_tokens,
        "trained_tokens": lab.result("sft_source_1")["num_tokens"] + learned_tokens,
        "cached_texts": texts["cached"],
        "seconds": sum(seconds[stage] for stage in PAST_STAGES),
    }


def _rounds(lab: Laboratory) -> range:
    return range(1, lab.config.seal.num_rounds + 1)
