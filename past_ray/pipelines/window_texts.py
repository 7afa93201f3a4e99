"""What is written about long documents: windows, summaries, recalls and pairs.

Reference: PaST https://arxiv.org/abs/2601.11258, LooGLE.
"""

# pyarrow's tables have no types that pyright can read.
# pyright: reportUnknownParameterType=false

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from past_ray.config.texts import WindowTextsConfig
from past_ray.engine.model_cache import cache_folder
from past_ray.pipelines.data import PAIRS, WINDOWS, domain_names, texts_file
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.stages import Stage, StageResult
from past_ray.runtime.text_job import TextJobResult, generate_texts
from past_ray.tasks.pairs import pair_rows, parse_pairs
from past_ray.tasks.synthesis import (
    TextRequest,
    pair_requests,
    recall_requests,
    summary_requests,
    training_texts,
)
from past_ray.tasks.tables import write_documents, write_questions
from past_ray.tasks.windows import token_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of documents the windows of some sizes read."""

    windows: int
    """Windows that are read."""

    windows_dropped: int
    """Windows behind the limit."""

    tokens_read: int
    """Tokens of the documents that lie in a window of any size."""

    tokens_dropped: int
    """Tokens of the documents that lie in none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTable:
    """Questions with answers that a domain trains on."""

    rows: list[dict[str, str]]
    """Rows for ``tables.write_questions``."""

    figures: dict[str, int]
    """Pairs written, pairs begun but dropped, texts asked for and without a pair, questions lent.
    """


def window_coverage(
    lengths: Sequence[int], *, sizes: Sequence[int], overlap: int, limit: int | None
) -> Coverage:
    """Count what the first ``limit`` windows of each size read.

    Args:
        lengths: Tokens of each document.
        sizes: Of the windows; each covers the document once.
        overlap: Tokens that neighbouring windows share.
        limit: Windows of each size and document; None for all.
    """
    num_windows = num_read = num_tokens = 0
    for length in lengths:
        of_sizes = [token_windows(length, size=size, overlap=overlap) for size in sizes]
        num_windows += sum(len(windows) for windows in of_sizes)
        num_read += sum(len(windows[:limit]) for windows in of_sizes)
        num_tokens += max(windows[:limit][-1].end for windows in of_sizes)
    return Coverage(
        windows=num_read,
        windows_dropped=num_windows - num_read,
        tokens_read=num_tokens,
        tokens_dropped=sum(lengths) - num_tokens,
    )


def write_window_texts(
    lab: Laboratory,
    name: str,
    config: WindowTextsConfig,
    *,
    writer: str,
    model: str,
    domains: Sequence[str],
) -> Stage:
    """Windows of ``domains``, and what ``model`` writes about them: texts and pairs.

    Two passes: summaries and pairs, then the recalls, whose prompts show the summaries.
    """

    def work() -> StageResult:
        asked = {domain: _requests(lab, config, domain) for domain in domains}
        lab.close_engines()
        first = _generate(lab, model, config, [r for s, p in asked.values() for r in (*s, *p)])
        recalls = {
            domain: recall_requests(summaries, first.texts, seed=lab.config.seed)
            for domain, (summaries, _) in asked.items()
        }
        second = _generate(lab, model, config, [r for of in recalls.values() for r in of])
        written = first.texts | second.texts
        truncated = first.truncated_ids | second.truncated_ids
        figures: dict[str, dict[str, Any]] = {}
        for domain, (summaries, pairs) in asked.items():
            requests = [*summaries, *recalls[domain]]
            write_documents(texts_file(lab.run, domain, WINDOWS), window_rows(summaries))
            texts = training_texts(requests, written)
            write_documents(texts_file(lab.run, domain, writer), texts.rows)
            figures[domain] = {
                **_document_figures(lab, config, domain),
                "texts": len(texts.rows),
                "empty": texts.num_dropped,
                "truncated": sum(r.request_id in truncated for r in (*requests, *pairs)),
                **_write_pairs(lab, config, domain, pairs, written),
            }
        return _stage_result(figures, (first, second))

    return Stage(name=name, work=work)


def window_rows(summaries: Sequence[TextRequest]) -> list[dict[str, str]]:
    """Return every window once, as rows of a documents table: ``<doc_id>#window-<size>.<number>``.

    Args:
        summaries: From ``synthesis.summary_requests``; each window has one with the number 0.
    """
    places = [(*_place(request), request) for request in summaries]
    return [
        {
            "doc_id": f"{request.doc_id}#window-{size}.{window}",
            "title": request.title,
            "text": request.passage,
        }
        for size, window, number, request in places
        if number == 0 and request.passage.strip()
    ]


def pairs_or_gold(
    requests: Sequence[TextRequest],
    texts: Mapping[str, str],
    *,
    gold: Sequence[Mapping[str, str]] | None,
) -> PairTable:
    """Return the readable pairs, and for documents without any the questions that are lent.

    Args:
        requests: From ``synthesis.pair_requests``.
        texts: What was generated, by ``request_id``.
        gold: Questions to lend; None refuses documents without pairs.

    Raises:
        DataError: A document has no pair, and ``gold`` is None.
    """
    parsed = [(request.doc_id, parse_pairs(texts[request.request_id])) for request in requests]
    fertile = {doc_id for doc_id, text in parsed if text.pairs}
    written = pair_rows([r for r in requests if gold is None or r.doc_id in fertile], texts).rows
    lent = [dict(row) for row in gold or () if row["doc_id"] not in fertile]
    return PairTable(
        rows=[*written, *lent],
        figures={
            "pairs": len(written),
            "pairs_dropped": sum(text.num_dropped for _, text in parsed),
            "pair_texts": len(requests),
            "pair_texts_unparsable": sum(not text.pairs for _, text in parsed),
            "gold_questions": len(lent),
        },
    )


def _requests(
    lab: Laboratory, config: WindowTextsConfig, domain: str
) -> tuple[list[TextRequest], list[TextRequest]]:
    """Ask for summaries and pairs; pairs only where something is trained on them."""
    documents = lab.domain(domain, texts=None).documents.to_pylist()
    tokenizer, seed = lab.tokenizer(), lab.config.seed
    summaries = summary_requests(
        documents,
        tokenizer,
        sizes=config.text_sizes,
        overlap=config.text_overlap,
        texts_per_window=config.texts_per_window,
        seed=seed,
    )
    pairs = pair_requests(
        documents,
        tokenizer,
        sizes=config.pair_sizes,
        overlap=config.pair_overlap,
        pairs_per_window=config.pairs_per_window,
        seed=seed,
    )
    limit = config.max_windows_per_document
    is_trained = _has_rl(lab, domain) or lab.config.sft_pairs is not None
    return _within(summaries, limit), _within(pairs, limit) if is_trained else []


def _within(requests: Sequence[TextRequest], limit: int | None) -> list[TextRequest]:
    return [r for r in requests if limit is None or _place(r)[1] < limit]


def _place(request: TextRequest) -> tuple[int, int, int]:
    """Size, window and number from ``<doc_id>#<kind>-<size>.<window>.<number>``."""
    size, window, number = request.request_id.rpartition("-")[2].split(".")
    return int(size), int(window), int(number)


def _has_rl(lab: Laboratory, domain: str) -> bool:
    return domain in domain_names(lab.config.num_rounds)[:-1]


def _generate(
    lab: Laboratory, model: str, config: WindowTextsConfig, requests: Sequence[TextRequest]
) -> TextJobResult:
    return generate_texts(
        requests,
        model_folder=lab.model(model),
        generation=config,
        runtime=lab.config.runtime,
        cache_dir=cache_folder("texts"),
        on_progress=lambda done, _: lab.show_step(done, {}),
    )


def _stage_result(
    figures: Mapping[str, Mapping[str, Any]], passes: Sequence[TextJobResult]
) -> StageResult:
    keys = ("texts", "empty", "truncated", "pairs")
    return {
        **{key: sum(of_domain[key] for of_domain in figures.values()) for key in keys},
        "cached": sum(result.num_cached for result in passes),
        "prompt_tokens": sum(result.num_prompt_tokens for result in passes),
        "new_tokens": sum(result.num_new_tokens for result in passes),
        "domains": figures,
    }


def _document_figures(lab: Laboratory, config: WindowTextsConfig, domain: str) -> dict[str, Any]:
    tokenizer = lab.tokenizer()
    lengths = [
        len(tokenizer.encode(text, add_special_tokens=False))
        for text in lab.domain(domain, texts=None).documents["text"].to_pylist()
    ]
    read = {
        "text_windows": (config.text_sizes, config.text_overlap),
        "pair_windows": (config.pair_sizes, config.pair_overlap),
    }
    limit = config.max_windows_per_document
    return {
        "documents": len(lengths),
        "tokens": sum(lengths),
        **{
            key: asdict(window_coverage(lengths, sizes=sizes, overlap=overlap, limit=limit))
            for key, (sizes, overlap) in read.items()
        },
    }


def _write_pairs(
    lab: Laboratory,
    config: WindowTextsConfig,
    domain: str,
    requests: Sequence[TextRequest],
    texts: Mapping[str, str],
) -> dict[str, int]:
    """Write the table that phase 2 and RL read, unless it were empty; return its figures."""
    gold: list[dict[str, str]] | None = None
    if config.on_no_pairs == "gold":
        is_lending = _has_rl(lab, domain)
        gold = lab.domain(domain, texts=None).questions.to_pylist() if is_lending else []
    table = pairs_or_gold(requests, texts, gold=gold)
    file = lab.run.tables(domain) / PAIRS
    file.unlink(missing_ok=True)
    if table.rows:
        write_questions(file, table.rows)
    return table.figures
