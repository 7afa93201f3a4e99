"""Tables of every domain, written once, and what training and evaluation read from them.

Domains: ``source_1``, ``source_2``, ... (one per refinement round), ``target`` and, where the
task has them, ``validation`` and ``held_out``. The folder of a domain::

    documents.parquet       the passages alone
    texts/given.parquet     texts about them that came with them, where there are any
    texts/<writer>.parquet  texts about them that a model wrote
    texts/windows.parquet   the windows of long documents
    pairs.parquet           questions with answers that a model wrote about windows
    questions.parquet       of the target: they only evaluate
    rl_questions.parquet    the miniature world's target only; nothing but arm target_rl reads it
"""

# pyarrow's tables have no types that pyright can read.
# pyright: reportUnknownParameterType=false

import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import pyarrow as pa

from past_ray.config.task import (
    LoogleTaskConfig,
    SplitConfig,
    SquadTaskConfig,
    TablesTaskConfig,
    TaskConfig,
    WorldTaskConfig,
)
from past_ray.errors import ConfigError
from past_ray.pipelines.stages import RunDirectory
from past_ray.sft.passage_sequences import (
    continued_pretraining_sequences,
    single_passage_sequences,
)
from past_ray.tasks import loogle, squad, world
from past_ray.tasks.examples import QAExample
from past_ray.tasks.passages import (
    Passage,
    check_disjoint_titles,
    check_questions_differ,
    given_rows,
    passage_rows,
    question_rows,
)
from past_ray.tasks.prompts import PromptStyle, qa_examples
from past_ray.tasks.splits import Split, preset_split, selected
from past_ray.tasks.tables import (
    read_documents,
    read_questions,
    write_documents,
    write_questions,
)

logger = logging.getLogger(__name__)

DOCUMENTS, GIVEN, QUESTIONS, RL_QUESTIONS = (
    "documents.parquet",
    "given",
    "questions.parquet",
    "rl_questions.parquet",
)
WINDOWS, PAIRS = "windows", "pairs.parquet"
TARGET, VALIDATION, HELD_OUT = "target", "validation", "held_out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One domain's tables."""

    documents: pa.Table
    """The passages; columns doc_id, title, text."""

    written: pa.Table | None = None
    """Texts about the passages, in the same columns; ``doc_id`` is ``<passage>#<n>``."""

    questions: pa.Table
    """Columns question_id, doc_id, question, answer."""

    style: PromptStyle
    """How a question becomes a prompt."""

    @property
    def sequences(self) -> list[str]:
        """Training texts of continued pretraining: texts and passages, titled where questions are.

        A passage is repeated once per text about it, so both weigh the same.
        """
        if self.style == "bare":
            return self.documents["text"].to_pylist()
        written = self._texts_by_passage()
        return [
            sequence
            for row in self.documents.to_pylist()
            for sequence in continued_pretraining_sequences(
                row["title"], passage=row["text"], generations=written[row["doc_id"]]
            )
        ]

    @property
    def passage_sequences(self) -> dict[str, list[str]]:
        """Training texts of each passage's own adapter, by the passage's id."""
        written = self._texts_by_passage()
        return {
            row["doc_id"]: single_passage_sequences(
                row["title"], passage=row["text"], generation="\n".join(written[row["doc_id"]])
            )
            for row in self.documents.to_pylist()
        }

    @property
    def resampled_by(self) -> dict[str, str] | None:
        """``passage_of`` for intervals over whole passages; None where there is only one."""
        return self.passage_of if len(self.documents) > 1 else None

    @property
    def passage_of(self) -> dict[str, str]:
        """Id of the passage that each question is about, by the question's id."""
        columns = self.questions.to_pydict()
        return dict(zip(columns["question_id"], columns["doc_id"], strict=True))

    def examples(self, *, in_context: bool = False) -> list[QAExample]:
        """Questions as prompts, closed book unless ``in_context``."""
        style = "in_context" if in_context else self.style
        return qa_examples(self.documents, self.questions, style=style)

    def _texts_by_passage(self) -> defaultdict[str, list[str]]:
        texts: defaultdict[str, list[str]] = defaultdict(list)
        for row in self.written.to_pylist() if self.written is not None else ():
            texts[row["doc_id"].partition("#")[0]].append(row["text"])
        return texts


def domain_names(num_rounds: int) -> list[str]:
    """Source domains of the refinement rounds, then the target."""
    return [*(f"source_{k}" for k in range(1, num_rounds + 1)), TARGET]


def further_domain_names(task: TaskConfig) -> list[str]:
    """``validation`` and ``held_out``, where the task has them."""
    if not isinstance(task, SquadTaskConfig | LoogleTaskConfig):
        return []
    further = {VALIDATION: task.validation, HELD_OUT: task.held_out}
    return [name for name, split in further.items() if split is not None]


def prepare_tables(task: TaskConfig, run: RunDirectory, *, num_rounds: int, seed: int) -> None:
    """Write and validate the tables of every domain.

    Raises:
        ConfigError: If there are fewer source files or folders than rounds.
        DataError: If a file or a table does not follow its schema, or domains share an article.
    """
    match task:
        case WorldTaskConfig():
            _write_world(task, run, num_rounds=num_rounds, seed=seed)
        case SquadTaskConfig() | LoogleTaskConfig():
            _check_rounds("task.sources", len(task.sources), num_rounds)
            _write_passages(task, run, num_rounds=num_rounds)
        case TablesTaskConfig():
            _check_rounds("task.source_dirs", len(task.source_dirs), num_rounds)
            folders = [*task.source_dirs[:num_rounds], task.target_dir]
            for name, folder in zip(domain_names(num_rounds), folders, strict=True):
                _copy_tables(folder, run.tables(name))
    for name in [*domain_names(num_rounds), *further_domain_names(task)]:
        load_domain(task, run, name)


def texts_file(run: RunDirectory, domain: str, writer: str) -> Path:
    """Table of the texts about ``domain`` that ``writer`` wrote; ``given`` came with the data."""
    return run.tables(domain) / "texts" / f"{writer}.parquet"


def load_domain(
    task: TaskConfig,
    run: RunDirectory,
    name: str,
    *,
    questions: str = QUESTIONS,
    texts: str | None = GIVEN,
) -> Domain:
    """Read and validate the tables of one domain.

    Args:
        task: Says how questions are asked.
        run: Where the tables are.
        name: Of the domain.
        questions: File of the questions.
        texts: Who wrote the texts about the passages; None for the passages alone. Only given
            texts may be missing.
    """
    folder = run.tables(name)
    documents = read_documents(folder / DOCUMENTS)
    written = texts_file(run, name, texts) if texts else None
    if written is not None and texts == GIVEN and not written.exists():
        written = None
    return Domain(
        documents=documents,
        written=read_documents(written) if written else None,
        questions=read_questions(folder / questions, documents),
        style="bare" if task.kind == "world" else "topic",
    )


def question_kind(task: TaskConfig, question_id: str) -> str:
    """What a question asks for; ``all`` where the task does not tell."""
    return str(world.question_kind(question_id)) if task.kind == "world" else "all"


def _write_world(task: WorldTaskConfig, run: RunDirectory, *, num_rounds: int, seed: int) -> None:
    for name in domain_names(num_rounds):
        people = world.build_population(name=name, num_people=task.num_people, seed=seed)
        rows = world.questions(
            people, num_pairs=task.num_pairs, num_comparisons=task.num_comparisons, seed=seed
        )
        documents = world.documents(people, num_paraphrases=task.num_paraphrases, seed=seed)
        folder = run.tables(name)
        write_documents(folder / DOCUMENTS, documents)
        if name == "target":
            rows, rl_rows = world.split_questions(rows)
            write_questions(folder / RL_QUESTIONS, rl_rows)
        write_questions(folder / QUESTIONS, rows)


def _write_passages(
    task: SquadTaskConfig | LoogleTaskConfig, run: RunDirectory, *, num_rounds: int
) -> None:
    splits = dict(
        zip(domain_names(num_rounds), [*task.sources[:num_rounds], task.target], strict=True)
    )
    further = {VALIDATION: task.validation, HELD_OUT: task.held_out}
    splits |= {name: split for name, split in further.items() if split is not None}
    domains = {name: _load_split(task.kind, name, split) for name, split in splits.items()}
    _check_domains(domains)
    num_given = task.num_completions if isinstance(task, SquadTaskConfig) else 0
    for name, passages in domains.items():
        folder = run.tables(name)
        write_documents(folder / DOCUMENTS, passage_rows(passages))
        write_questions(folder / QUESTIONS, question_rows(passages))
        file = texts_file(run, name, GIVEN)
        given = given_rows(passages, num_completions=0 if name == HELD_OUT else num_given)
        if given:
            write_documents(file, given)
        else:
            file.unlink(missing_ok=True)


def _load_split(kind: Literal["squad", "loogle"], name: str, config: SplitConfig) -> list[Passage]:
    start, count = config.start, config.count
    if config.preset is not None:
        split = preset_split(config.preset, path=config.path, start=start, count=count)
    else:
        assert config.path is not None
        split = Split(path=config.path, start=start, count=count)
    load = squad.load_passages if kind == "squad" else loogle.load_passages
    passages = selected(load(split.path), split)
    if not (split.keep_repeated or config.keep_repeated):
        check_questions_differ(passages)
    num_unanswerable = sum(passage.num_unanswerable for passage in passages)
    if num_unanswerable:
        logger.warning(
            "%s: left out %d questions that their passages do not answer", name, num_unanswerable
        )
    return passages


def _check_domains(domains: Mapping[str, Sequence[Passage]]) -> None:
    """Refuse a title that target or held_out share with another domain.

    Sources and validation may share articles, as the published rounds do.
    """
    for left, right in combinations(domains, 2):
        is_pair_of_sources = left.startswith("source_") and right.startswith("source_")
        if is_pair_of_sources or (VALIDATION in (left, right) and TARGET not in (left, right)):
            continue
        check_disjoint_titles(domains[left], domains[right], left_name=left, right_name=right)


def _copy_tables(source: Path, destination: Path) -> None:
    documents = read_documents(source / DOCUMENTS)
    read_questions(source / QUESTIONS, documents)
    destination.mkdir(parents=True, exist_ok=True)
    for name in (DOCUMENTS, QUESTIONS):
        shutil.copyfile(source / name, destination / name)


def _check_rounds(key: str, found: int, num_rounds: int) -> None:
    if found < num_rounds:
        raise ConfigError(
            f"{key} must have one entry per refinement round, got {found} for {num_rounds} rounds. "
            "Add entries, or drop the arm past_two_rounds."
        )
