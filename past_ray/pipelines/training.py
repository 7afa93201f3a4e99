"""The stages that train: SFT on documents and GRPO on questions."""

from collections.abc import Sequence

from past_ray.pipelines.data import GIVEN, QUESTIONS
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.stages import Stage, StageResult
from past_ray.runtime.checkpoints import checkpoint_folder
from past_ray.runtime.controller import RLRun, train_grpo
from past_ray.runtime.sft_trainer import train_sft
from past_ray.sft.examples import document_examples
from past_ray.skill.checkpoint import load_weights, save_checkpoint
from past_ray.storage import read_jsonl


def sft(
    lab: Laboratory,
    name: str,
    *,
    init: str,
    domain: str,
    texts: str | None = GIVEN,
    num_steps: int | None = None,
) -> Stage:
    """SFT of the model ``init`` on the passages of ``domain`` and what ``texts`` wrote on them."""
    sft = lab.config.sft
    if num_steps is not None:
        sft = sft.model_copy(update={"num_steps": num_steps, "num_epochs": None})

    def work() -> StageResult:
        lab.make_room_for_sft()
        tokenizer = lab.tokenizer()
        sequences = lab.domain(domain, texts=texts).sequences
        result = train_sft(
            examples=document_examples(sequences, tokenizer, max_length=sft.max_length),
            init_folder=lab.model(init),
            out_folder=lab.model(name),
            sft=sft,
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

    return Stage(name=name, work=work, num_steps=None if sft.num_epochs else sft.num_steps)


def rl(
    lab: Laboratory,
    name: str,
    *,
    init: str,
    reference: str,
    domain: str,
    num_steps: int,
    questions: str = QUESTIONS,
    keep_steps: Sequence[int] = (),
) -> Stage:
    """GRPO from the model ``init`` on the questions of ``domain``."""
    rl = lab.config.rl.model_copy(update={"num_steps": num_steps})

    def work() -> StageResult:
        examples = lab.domain(domain, questions=questions).examples()
        run = RLRun(
            init_folder=lab.model(init).resolve(),
            reference_folder=lab.model(reference).resolve(),
            work_dir=lab.run.work(name).resolve(),
            seed=lab.config.seed,
            keep_steps=tuple(keep_steps),
        )
        last = lab.run_async(
            train_grpo(
                lab.session(),
                run,
                rl,
                examples=examples,
                probe=lab.prompt_ids(examples[: rl.num_parity_prompts]),
                on_step=lab.on_rl_step,
            )
        )
        for step in (*keep_steps, num_steps):
            weights = load_weights(checkpoint_folder(run.work_dir, step))
            out = lab.model(name if step == num_steps else f"{name}-step{step}")
            save_checkpoint(out, weights, like=last)
        return {"metrics": read_jsonl(run.work_dir / "metrics.jsonl")}

    return Stage(name=name, work=work, num_steps=num_steps)
