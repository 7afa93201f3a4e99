"""Long documents: read through windows, trained in two phases.

::

    document --> windows --> summaries --> recalls      phase 1: windows, summaries and recalls
        |
        +------> windows --> questions with answers     phase 2, closed book; RL on the source

No document is one example, so a forward pass of SFT has at most ``max(max_length,
max_tokens_per_micro_batch)`` tokens, however long the documents are. Windows cover every token;
what ``max_windows_per_document`` leaves out is counted.

Reference: PaST https://arxiv.org/abs/2601.11258, LooGLE.

Differs from the paper: phase 1 also has every window itself, once under the document's title, so
that what no summary mentions is trained too.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from past_ray.config.sft import SFTConfig
from past_ray.errors import DataError
from past_ray.pipelines.data import PAIRS, WINDOWS, texts_file
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.stages import Stage, StageResult
from past_ray.runtime.sft_trainer import SFTResult, train_sft
from past_ray.sft.examples import SFTExample, chat_example, document_examples
from past_ray.sft.passage_sequences import continued_pretraining_sequences
from past_ray.skill.checkpoint import LINEAGE_FILE, hash_weights
from past_ray.storage import write_json
from past_ray.tasks.tables import read_documents


def window_sft(lab: Laboratory, name: str, *, init: str, domain: str, texts: str | None) -> Stage:
    """SFT of the model ``init`` on windows and texts of ``domain``, then on its pairs.

    Without ``texts`` the windows alone are trained, and no pairs.
    """

    def work() -> StageResult:
        lab.make_room_for_sft()
        tokenizer, sft = lab.tokenizer(), lab.config.sft
        phases = [(sft, _text_examples(lab, domain, texts, tokenizer))]
        pairs = _pair_examples(lab, domain, tokenizer) if texts else []
        if lab.config.sft_pairs and pairs:
            phases.append((lab.config.sft_pairs, pairs))
        results = _train_phases(lab, name, init, phases)
        return {
            "losses": [loss for result in results for loss in result.losses],
            "num_tokens": sum(result.num_tokens for result in results),
            "training_seconds": sum(result.seconds for result in results),
            "phases": [
                {
                    "examples": len(examples),
                    "tokens": sum(example.num_loss_tokens for example in examples),
                    "steps": len(result.losses),
                    "tokens_trained": result.num_tokens,
                    "max_tokens_at_once": max(recipe.max_length, recipe.max_tokens_per_micro_batch),
                }
                for (recipe, examples), result in zip(phases, results, strict=True)
            ],
        }

    return Stage(name=name, work=work)


def document_figures(lab: Laboratory) -> dict[str, Any]:
    """What became of the documents of each domain: tokens read and dropped, texts, pairs, phases.

    The tokens of a phase are those with loss: of one pass over its examples, and of all steps.
    """
    stages = [lab.result(name) for name in ("texts_source", "texts_target")]
    written: dict[str, Any] = stages[0]["domains"] | stages[1]["domains"]
    trained = {name: lab.result(f"sft_{name}") for name in written}
    return {
        name: {**figures, "phases": trained[name]["phases"]} for name, figures in written.items()
    }


def _text_examples(
    lab: Laboratory, domain: str, texts: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[SFTExample]:
    """Phase 1: each window and each text about one, under the title of its document."""
    sequences = [
        sequence
        for writer in (WINDOWS, *([texts] if texts else []))
        for row in read_documents(texts_file(lab.run, domain, writer)).to_pylist()
        for sequence in continued_pretraining_sequences(
            row["title"], passage=row["text"], generations=()
        )
    ]
    return document_examples(sequences, tokenizer, max_length=lab.config.sft.max_length)


def _pair_examples(
    lab: Laboratory, domain: str, tokenizer: PreTrainedTokenizerBase
) -> list[SFTExample]:
    """Phase 2: the pairs, asked as they are asked in evaluation. Empty where there are none."""
    if lab.config.sft_pairs is None or not (lab.run.tables(domain) / PAIRS).exists():
        return []
    limit = lab.config.sft_pairs.max_length
    questions = lab.domain(domain, questions=PAIRS, texts=None).examples()
    examples = [
        chat_example(
            [{"role": m["role"], "content": m["content"]} for m in question.messages],
            question.answer,
            tokenizer,
        )
        for question in questions
    ]
    longest = max(len(example.token_ids) for example in examples)
    if longest > limit:
        raise DataError(
            f"sft_pairs.max_length must hold every question with its answer, got {limit} while the "
            f"longest of {domain} has {longest} tokens. Raise it; pairs are never cut."
        )
    return examples


def _train_phases(
    lab: Laboratory,
    name: str,
    init: str,
    phases: Sequence[tuple[SFTConfig, Sequence[SFTExample]]],
) -> list[SFTResult]:
    """Train one phase after the other; only the last model is kept."""
    results: list[SFTResult] = []
    start = lab.model(init)
    between = lab.run.work(name) / "between"
    for number, (recipe, examples) in enumerate(phases, start=1):
        out = lab.model(name) if number == len(phases) else between
        num_before = sum(len(result.losses) for result in results)
        results.append(
            train_sft(
                examples=examples,
                init_folder=start,
                out_folder=out,
                sft=recipe,
                runtime=lab.config.runtime,
                seed=lab.config.seed,
                work_dir=lab.run.work(name) / f"phase_{number}",
                on_step=lambda row, before=num_before: lab.on_sft_step(
                    {**row, "step": row["step"] + before}
                ),
            )
        )
        start = out
    _record_base(lab.model(name), lab.model(init))
    shutil.rmtree(between, ignore_errors=True)
    return results


def _record_base(model: Path, base: Path) -> None:
    """Let a model name what its first phase started from: skill vectors ask for a common base."""
    record = json.loads((model / LINEAGE_FILE).read_text(encoding="utf-8"))
    write_json(model / LINEAGE_FILE, {**record, "base_hash": hash_weights(base)})
