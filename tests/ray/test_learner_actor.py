import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from past_ray.config.rl import RLConfig
from past_ray.config.sft import LoraConfig
from past_ray.errors import DataError
from past_ray.rl.batching import split_over_ranks
from past_ray.rl.objective import StepTotals, count_totals
from past_ray.rl.types import TrainSample
from past_ray.runtime.learner_actor import LearnerActor, LearnerShell
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

CONFIG = RLConfig(
    kl={"coefficient": 0.1},
    learning_rate=1e-3,
    max_tokens_per_micro_batch=20,
    temperature=0.7,
    weight_decay=0.01,
)
LENGTHS = (9, 5, 12, 7, 4)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory(
        prefix="r_la_", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}},
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_folders(tmp_path_factory.mktemp("models"), is_tied=False)


def make_folders(root: Path, *, is_tied: bool) -> tuple[Path, Path]:
    """Policy and reference."""
    return (
        make_tiny_model(root / "policy", tie_word_embeddings=is_tied),
        make_tiny_model(root / "reference", seed=1, tie_word_embeddings=is_tied),
    )


def make_batch(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[TrainSample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        mask = [index >= length // 2 for index in range(length)]
        advantage = torch.randn((), generator=generator).item()
        samples.append(
            TrainSample(
                token_ids=torch.randint(6, 60, (length,), generator=generator).tolist(),
                loss_mask=mask,
                generator_logprobs=[-3.0 if trains else 0.0 for trains in mask],
                advantages=[advantage if trains else 0.0 for trains in mask],
            )
        )
    return samples


class Learners:
    """All ranks of one learner; ended by ``with``."""

    def __init__(self, num_ranks: int, config: RLConfig = CONFIG) -> None:
        self.ranks = [
            LearnerActor.remote(config, rank=rank, world_size=num_ranks)
            for rank in range(num_ranks)
        ]
        address = ray.get(self.ranks[0].rendezvous_address.remote())
        self.all("setup", address, "gloo")

    def __enter__(self) -> "Learners":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            ray.kill(rank)

    def all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return ray.get([getattr(rank, method).remote(*args, **kwargs) for rank in self.ranks])

    def load(self, folders: tuple[Path, Path], resume_from: Path | None = None) -> int:
        (version, *others) = self.all(
            "load", folders[0], reference=folders[1], resume_from=resume_from
        )
        assert all(other == version for other in others)
        return version

    def step(self, samples: list[TrainSample]) -> dict[str, float]:
        shares = split_over_ranks(samples, len(self.ranks))
        totals = count_totals(samples, rollout_token_limit=8)
        metrics = ray.get(
            [
                rank.train_step.remote(share, totals=totals)
                for rank, share in zip(self.ranks, shares, strict=True)
            ]
        )
        assert all(other == metrics[0] for other in metrics)
        return metrics[0]


def run(num_ranks: int, folders: tuple[Path, Path], saved: Path, config: RLConfig) -> Any:
    """Three steps, the second with one sample, so that a second rank has only a filler."""
    with Learners(num_ranks, config) as learners:
        learners.load(folders)
        metrics = [learners.step(make_batch(0)), learners.step(make_batch(1, (6,)))]
        learners.all("save", saved)
        metrics.append(learners.step(make_batch(2)))
        weights = learners.all("export_weights")
        logprobs = learners.all("token_logprobs", make_batch(3))[-1]
    assert all(other == {} for other in weights[1:])
    return metrics, weights[0], logprobs


@pytest.mark.parametrize(
    ("is_tied", "lora"),
    [(True, None), (False, LoraConfig(rank=4, alpha=8))],
    ids=["tied-full", "untied-lora"],
)
def test_two_ranks_equal_one_and_each_resumes_the_other(
    tmp_path: Path, is_tied: bool, lora: LoraConfig | None
):
    folders = make_folders(tmp_path, is_tied=is_tied)
    config = CONFIG.model_copy(update={"lora": lora})
    one, two = (run(n, folders, tmp_path / f"ranks{n}", config) for n in (1, 2))
    for ours, theirs in zip(two[0], one[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert two[1].keys() == one[1].keys()
    for name, weight in one[1].items():
        # A key bias hardly moves attention: its gradient is rounding noise, of which Adam keeps
        # the sign: a step of the learning rate either way.
        atol = 2 * CONFIG.learning_rate if name.endswith("k_proj.bias") else 1e-5
        torch.testing.assert_close(
            two[1][name], weight, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    for ours, theirs in zip(two[2], one[2], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)

    with Learners(2, config) as learners:
        assert learners.load(folders, resume_from=tmp_path / "ranks2") == 2
        assert learners.step(make_batch(2)) == two[0][2]
        weights = learners.all("export_weights")[0]
        assert all(torch.equal(weights[name], two[1][name]) for name in weights)
        assert learners.load(folders, resume_from=tmp_path / "ranks1") == 2
        assert learners.step(make_batch(2)) == pytest.approx(one[0][2], rel=1e-4, abs=1e-5)


def test_error_inside_the_actor_arrives_as_our_class(folders: tuple[Path, Path]):
    with Learners(1) as learners:
        learners.load(folders)
        totals = StepTotals(num_loss_tokens=1, num_rollouts=1, rollout_token_limit=8)
        with pytest.raises(DataError, match="must count the samples of all ranks") as caught:
            ray.get(learners.ranks[0].train_step.remote(make_batch(0), totals=totals))
        assert isinstance(caught.value, RayTaskError)


def test_shell_is_a_plain_object(folders: tuple[Path, Path]):
    shell = LearnerShell(CONFIG, rank=0, world_size=1)
    shell.setup(("127.0.0.1", 0), "gloo")
    assert shell.load(folders[0], reference=folders[1], resume_from=None) == 0
    batch = make_batch(0)
    assert shell.logprob_gap(batch) > 0
    shell.train_step(batch, totals=count_totals(batch, rollout_token_limit=8))
    assert "model.embed_tokens.weight" in shell.export_weights()


def test_rendezvous_port_is_free():
    host, port = LearnerShell(CONFIG, rank=0, world_size=1).rendezvous_address()
    assert host
    assert 1024 < port < 65536
