"""The stages of self-written texts and of single passages (n=1): each passage an adapter."""

from collections.abc import Sequence

from past_ray.config.texts import PassageTextsConfig
from past_ray.engine.model_cache import cache_folder
from past_ray.pipelines.data import GIVEN, texts_file
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.stages import Stage, StageResult
from past_ray.runtime.passage_adapters import AdapterResult, PassageJob, train_passage_adapters
from past_ray.runtime.text_job import generate_texts
from past_ray.sft.examples import document_examples
from past_ray.tasks.synthesis import passage_requests, training_texts
from past_ray.tasks.tables import write_documents


def write_texts(
    lab: Laboratory,
    name: str,
    config: PassageTextsConfig,
    *,
    writer: str,
    model: str,
    domains: Sequence[str],
) -> Stage:
    """Texts about the passages of ``domains`` by ``model``; they are found under ``writer``."""

    def work() -> StageResult:
        requests = {
            domain: passage_requests(
                lab.domain(domain, texts=None).documents.to_pylist(),
                kinds=config.kinds,
                texts_per_kind=config.texts_per_kind,
                seed=lab.config.seed,
            )
            for domain in domains
        }
        lab.close_engines()
        result = generate_texts(
            [request for of_domain in requests.values() for request in of_domain],
            model_folder=lab.model(model),
            generation=config,
            runtime=lab.config.runtime,
            cache_dir=cache_folder("texts"),
            on_progress=lambda done, _: lab.show_step(done, {}),
        )
        texts = {
            domain: training_texts(of_domain, result.texts)
            for domain, of_domain in requests.items()
        }
        for domain, written in texts.items():
            write_documents(texts_file(lab.run, domain, writer), written.rows)
        return {
            "texts": sum(len(written.rows) for written in texts.values()),
            "empty": sum(written.num_dropped for written in texts.values()),
            "truncated": len(result.truncated_ids),
            "cached": result.num_cached,
            "prompt_tokens": result.num_prompt_tokens,
            "new_tokens": result.num_new_tokens,
        }

    return Stage(name=name, work=work)


def adapters(
    lab: Laboratory, name: str, *, init: str, domain: str, texts: str | None = GIVEN
) -> Stage:
    """One LoRA adapter per passage of ``domain``, each on the model ``init`` alone."""
    config = lab.config.single_passage
    assert config is not None, "adapters are for runs with single_passage"

    def work() -> StageResult:
        tokenizer = lab.tokenizer()
        jobs = [
            PassageJob(
                passage_id=passage_id,
                examples=tuple(
                    document_examples(sequences, tokenizer, max_length=config.max_length)
                ),
            )
            for passage_id, sequences in lab.domain(domain, texts=texts).passage_sequences.items()
        ]
        lab.close_engines()
        done: list[AdapterResult] = []

        def show(result: AdapterResult) -> None:
            done.append(result)
            lab.show_step(len(done), {"loss": result.loss_last})

        results = train_passage_adapters(
            jobs,
            model_folder=lab.model(init),
            config=config,
            runtime=lab.config.runtime,
            out_folder=lab.run.adapters(name),
            on_done=show,
        )
        return {
            "adapters": len(results),
            "loss_first": [result.loss_first for result in results],
            "loss_last": [result.loss_last for result in results],
            "num_tokens": sum(result.num_tokens for result in results),
            "training_seconds": sum(result.seconds for result in results),
        }

    return Stage(name=name, work=work)
