"""One round of SEAL: self-edits, the adapters that learn them, the best ones, and a new writer."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from past_ray.config.texts import PassageTextsConfig
from past_ray.envs.chat import chat_codec
from past_ray.pipelines.data import texts_file
from past_ray.pipelines.edit_choice import choose_edits
from past_ray.pipelines.evaluation import Answer, judged_answers
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.passages import write_texts
from past_ray.pipelines.stages import Stage, StageResult
from past_ray.rl.types import Completion, SamplingParams
from past_ray.runtime.adapter_answers import AdapterRequest
from past_ray.runtime.passage_adapters import AdapterResult, PassageJob, train_passage_adapters
from past_ray.runtime.sft_trainer import train_sft
from past_ray.sft.examples import SFTExample, chat_example, document_examples
from past_ray.sft.passage_sequences import single_passage_sequences
from past_ray.skill.checkpoint import load_weights
from past_ray.tasks.examples import QAExample
from past_ray.tasks.judging import JudgeFailure, JudgeOutcome
from past_ray.tasks.synthesis import passage_requests
from past_ray.tasks.tables import read_documents

SOURCE = "source_1"
"""Domain whose passages are written about and whose questions choose."""

PREFIX = "seal_"
"""Begins the names of the stages of all rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfEdit:
    """One text about a passage, as something to train an adapter on."""

    edit_id: str
    """Id of the request that it answers."""

    passage_id: str
    """The passage that it is about."""

    text: str
    """What the writer wrote."""

    sequences: tuple[str, ...]
    """What an adapter trains on: the lines of the text, and the passage."""

    @property
    def folder_name(self) -> str:
        """Name of its adapters' folders."""
        return self.edit_id.replace("#", ".")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """One question to one adapter."""

    edit: SelfEdit
    """What the adapter was trained on."""

    adapter: Path
    """Its folder."""

    example: QAExample
    """The question."""

    prompt_ids: list[int]
    """The question as the engine gets it."""


def writer_after(r: int) -> str:
    """Model that round ``r`` ends with; the base has written nothing yet."""
    return f"seal_writer_{r}" if r else "base"


def texts_config(lab: Laboratory) -> PassageTextsConfig:
    """How texts are sampled, on the target as in the other arms."""
    texts = lab.config.texts
    assert isinstance(texts, PassageTextsConfig), "arm seal is for runs with texts about passages"
    return texts


def self_edits(lab: Laboratory, r: int) -> Stage:
    """Texts of the writer of round ``r - 1`` about the passages of the source."""
    writer = f"{PREFIX}{r}"
    return write_texts(
        lab,
        f"{writer}_texts",
        _sampled(lab),
        writer=writer,
        model=writer_after(r - 1),
        domains=[SOURCE],
    )


def edit_adapters(lab: Laboratory, r: int) -> Stage:
    """Adapters on the writer of round ``r - 1``: one per self-edit and seed."""
    name, config = f"{PREFIX}{r}_adapters", lab.config.single_passage
    assert config is not None, "arm seal is for runs with single_passage"

    def work() -> StageResult:
        tokenizer = lab.tokenizer()
        jobs = [
            PassageJob(
                passage_id=edit.folder_name,
                examples=tuple(
                    document_examples(edit.sequences, tokenizer, max_length=config.max_length)
                ),
            )
            for edit in _self_edits(lab, r)
        ]
        lab.close_engines()
        results: list[AdapterResult] = []

        def show(result: AdapterResult) -> None:
            results.append(result)
            lab.show_step(len(results), {"loss": result.loss_last})

        for seed, folder in enumerate(_adapter_folders(lab, r)):
            train_passage_adapters(
                jobs,
                model_folder=lab.model(writer_after(r - 1)),
                config=config.model_copy(update={"seed": config.seed + seed}),
                runtime=lab.config.runtime,
                out_folder=folder,
                on_done=show,
            )
        return {
            "adapters": len(results),
            "num_tokens": sum(result.num_tokens for result in results),
            "training_seconds": sum(result.seconds for result in results),
        }

    return Stage(name=name, work=work)


def edit_scores(lab: Laboratory, r: int) -> Stage:
    """Answers of every adapter to its passage's questions, and the best self-edits by them."""

    def work() -> StageResult:
        trials = _trials(lab, r)
        answers = _answers(lab, r, trials)
        outcomes: dict[str, dict[str, list[JudgeOutcome]]]
        outcomes = {edit.passage_id: {} for edit in _self_edits(lab, r)}
        for trial, answer in zip(trials, answers, strict=True):
            of_passage = outcomes[trial.edit.passage_id]
            of_passage.setdefault(trial.edit.edit_id, []).append(answer.outcome)
        choice = choose_edits(outcomes)
        return {
            **asdict(choice),
            "num_passages": len(choice.best),
            "mean_score": fmean(choice.scores.values()),
            "mean_best_score": fmean(choice.scores[edit] for edit in choice.best.values()),
            "judge_failures": sum(isinstance(a.outcome, JudgeFailure) for a in answers),
            "answers": len(answers),
            "new_tokens": sum(answer.num_tokens for answer in answers),
        }

    return Stage(name=f"{PREFIX}{r}_scores", work=work)


def new_writer(lab: Laboratory, r: int) -> Stage:
    """SFT of the writer of round ``r - 1`` on prompt -> best self-edit."""
    name = f"{PREFIX}{r}_writer"

    def work() -> StageResult:
        lab.make_room_for_sft()
        result = train_sft(
            examples=_writer_examples(lab, r),
            init_folder=lab.model(writer_after(r - 1)),
            out_folder=lab.model(writer_after(r)),
            sft=lab.config.seal.sft,
            runtime=lab.config.runtime,
            seed=lab.config.seed,
            work_dir=lab.run.work(name),
            on_step=lab.on_sft_step,
        )
        return {
            "losses": result.losses,
            "num_tokens": result.num_tokens,
            "training_seconds": result.seconds,
        }

    return Stage(name=name, work=work)


def _trials(lab: Laboratory, r: int) -> list[_Trial]:
    """Every adapter with every question of its passage, in the order of the self-edits."""
    source = lab.domain(SOURCE, texts=None)
    examples, passage_of = source.examples(), source.passage_of
    asked: defaultdict[str, list[tuple[QAExample, list[int]]]] = defaultdict(list)
    for example, prompt_ids in zip(examples, lab.prompt_ids(examples), strict=True):
        asked[passage_of[example.question_id]].append((example, prompt_ids))
    return [
        _Trial(edit=edit, adapter=folder / edit.folder_name, example=example, prompt_ids=prompt_ids)
        for edit in _self_edits(lab, r)
        for folder in _adapter_folders(lab, r)
        for example, prompt_ids in asked[edit.passage_id]
    ]


def _answers(lab: Laboratory, r: int, trials: Sequence[_Trial]) -> list[Answer]:
    """Judged answers, as short as those of the arms."""
    requests = [
        AdapterRequest(
            request_id=f"{trial.adapter}/{trial.example.question_id}",
            prompt_ids=trial.prompt_ids,
            adapter=trial.adapter,
        )
        for trial in trials
    ]
    greedy = SamplingParams(temperature=0.0, max_new_tokens=lab.config.evaluation.max_new_tokens)
    done: list[str] = []

    def show(request_id: str, _: Completion) -> None:
        done.append(request_id)
        lab.show_step(len(done), {})

    engines = lab.answers()
    engines.load_base(load_weights(lab.model(writer_after(r - 1))), lab.next_version())
    return judged_answers(
        [trial.example for trial in trials],
        engines.answer(requests, [greedy] * len(requests), show),
        decode=chat_codec(lab.tokenizer()).decode,
        judge=lab.judge(),
    )


def _writer_examples(lab: Laboratory, r: int) -> list[SFTExample]:
    """The best self-edits, each behind the prompt that it was sampled from."""
    config = _sampled(lab)
    requests = passage_requests(
        lab.domain(SOURCE, texts=None).documents.to_pylist(),
        kinds=config.kinds,
        texts_per_kind=config.texts_per_kind,
        seed=lab.config.seed,
    )
    prompts = {request.request_id: request.messages for request in requests}
    texts = {edit.edit_id: edit.text for edit in _self_edits(lab, r)}
    tokenizer = lab.tokenizer()
    return [
        chat_example(
            [{"role": turn["role"], "content": turn["content"]} for turn in prompts[edit]],
            texts[edit],
            tokenizer,
        )
        for edit in lab.result(f"{PREFIX}{r}_scores")["best"].values()
    ]


def _self_edits(lab: Laboratory, r: int) -> list[SelfEdit]:
    """Self-edits of round ``r`` in the order they were asked for; empty ones are left out."""
    passages = {
        row["doc_id"]: row["text"] for row in lab.domain(SOURCE, texts=None).documents.to_pylist()
    }
    rows = read_documents(texts_file(lab.run, SOURCE, f"{PREFIX}{r}")).to_pylist()
    return [
        SelfEdit(
            edit_id=row["doc_id"],
            passage_id=passage_id,
            text=row["text"],
            sequences=tuple(
                single_passage_sequences(
                    row["title"], passage=passages[passage_id], generation=row["text"]
                )
            ),
        )
        for row in rows
        for passage_id in [row["doc_id"].partition("#")[0]]
    ]


def _adapter_folders(lab: Laboratory, r: int) -> list[Path]:
    """One folder of adapters per seed."""
    root = lab.run.adapters(f"{PREFIX}{r}").resolve()
    return [root / f"seed-{seed}" for seed in range(lab.config.seal.num_seeds)]


def _sampled(lab: Laboratory) -> PassageTextsConfig:
    """How self-edits are sampled."""
    return texts_config(lab).model_copy(update={"texts_per_kind": lab.config.seal.num_self_edits})
