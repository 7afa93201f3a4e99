"""Tables of every domain, written once, and what training and evaluation read from them.

Domains: ``source_1``, ``source_2``, ... (one per refinement round) and ``target``. A domain folder
holds ``documents.parquet`` and ``questions.parquet``. The target's questions only evaluate; the
miniature world also has ``rl_questions.parquet``, which nothing but the arm ``target_rl`` reads.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from past_ray.config.task import SquadTaskConfig, TablesTaskConfig, TaskConfig, WorldTaskConfig
from past_ray.errors import ConfigError
from past_ray.pipelines.stages import RunDirectory
from past_ray.tasks import squad, world
from past_ray.tasks.examples import QAExample
from past_ray.tasks.prompts import qa_examples
from past_ray.tasks.tables import (
    read_documents,
    read_questions,
    write_documents,
    write_questions,
)

DOCUMENTS, QUESTIONS, RL_QUESTIONS = (
    "documents.parquet",
    "questions.parquet",
    "rl_questions.parquet",
)

PromptStyle = Literal["bare", "topic", "in_context"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One domain's tables."""

    documents: pa.Table
    """Columns doc_id, title, text."""

    questions: pa.Table
    """Columns question_id, doc_id, question, answer."""

    style: PromptStyle
    """How a question becomes a prompt."""

    @property
    def texts(self) -> list[str]:
        """Training texts; a title line comes first where titles are part of the question."""
        columns = self.documents.to_pydict()
        if self.style == "bare":
            return columns["text"]
        return [f"{t}\n{x}" for t, x in zip(columns["title"], columns["text"], strict=True)]

    def examples(self, *, in_context: bool = False) -> list[QAExample]:
        """Questions as prompts, closed book unless ``in_context``."""
        style = "in_context" if in_context else self.style
        return qa_examples(self.documents, self.questions, style=style)


def domain_names(num_rounds: int) -> list[str]:
    """Source domains of the refinement rounds, then the target."""
    return [*(f"source_{k}" for k in range(1, num_rounds + 1)), "target"]


def prepare_tables(task: TaskConfig, run: RunDirectory, *, num_rounds: int, seed: int) -> None:
    """Write and validate the tables of every domain.

    Raises:
        ConfigError: If there are fewer source files or folders than rounds.
        DataError: If a table does not follow its schema.
    """
    match task:
        case WorldTaskConfig():
            _write_world(task, run, num_rounds=num_rounds, seed=seed)
        case SquadTaskConfig():
            _check_rounds("task.source_paths", len(task.source_paths), num_rounds)
            _write_squad(task, run, num_rounds=num_rounds)
        case TablesTaskConfig():
            _check_rounds("task.source_dirs", len(task.source_dirs), num_rounds)
            folders = [*task.source_dirs[:num_rounds], task.target_dir]
            for name, folder in zip(domain_names(num_rounds), folders, strict=True):
                _copy_tables(folder, run.tables(name))
    for name in domain_names(num_rounds):
        load_domain(task, run, name)


def load_domain(
    task: TaskConfig, run: RunDirectory, name: str, *, questions: str = QUESTIONS
) -> Domain:
    """Read and validate the tables of one domain."""
    folder = run.tables(name)
    documents = read_documents(folder / DOCUMENTS)
    return Domain(
        documents=documents,
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


def _write_squad(task: SquadTaskConfig, run: RunDirectory, *, num_rounds: int) -> None:
    target = squad.load_passages(task.target_path, num_passages=task.num_target_passages)
    passages: dict[str, Sequence[Any]] = {
        f"source_{k + 1}": squad.load_passages(path, num_passages=task.num_source_passages)
        for k, path in enumerate(task.source_paths[:num_rounds])
    }
    for source in passages.values():
        squad.check_disjoint_titles(source, target)
    for name, members in {**passages, "target": target}.items():
        documents, questions = squad.passage_tables(members, num_completions=task.num_completions)
        write_documents(run.tables(name) / DOCUMENTS, documents)
        write_questions(run.tables(name) / QUESTIONS, questions)


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
