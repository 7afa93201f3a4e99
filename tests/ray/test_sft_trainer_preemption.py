"""A spot reclaim, as clouds do it: Ray is told that a node drains, and later the node is gone."""

import json
import threading
import time

import pytest
import ray
import torch
from ray._private.state import actors
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from past_ray.config.runtime import RuntimeConfig
from past_ray.config.sft import SFTConfig
from past_ray.runtime.sft_trainer import train_sft
from past_ray.sft.examples import document_examples
from past_ray.skill.checkpoint import load_weights
from tests.tiny_model import make_tiny_model, make_tiny_tokenizer

pytestmark = pytest.mark.ray

NUM_STEPS = 1000
NOTICE_S = 4.0
PREEMPTION = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
WORDS = ["bread", "soup", "rice", "fish", "cat", "dog", "bird", "doctor", "baker", "teacher"]
TEXTS = [f"anna {'likes ' * (index % 4 + 1)}{word} ." for index, word in enumerate(WORDS)]


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs and three nodes; a node holds one rank and its reader."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": "/tmp/r_sft_spot"},
    )
    nodes = [cluster.add_node(num_cpus=2) for _ in range(3)]
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


class Reclaim:
    """Takes the node of one rank away: a notice when ``step`` is seen, the end after NOTICE_S."""

    def __init__(self, cluster, nodes, *, step):
        self._cluster, self._nodes, self._step = cluster, nodes, step
        self._end = None

    def __call__(self, record):
        if record["step"] == self._step:
            self._drain(self._find_node())

    def wait(self):
        self._end.join()

    def _find_node(self):
        ranks = [
            actor["Address"]["NodeID"]
            for actor in actors().values()
            if actor["ActorClassName"] == "RayTrainWorker" and actor["State"] == "ALIVE"
        ]
        assert len(set(ranks)) == 2
        return next(node for node in self._nodes if node.node_id == ranks[0])

    def _drain(self, node):
        deadline_ms = int((time.time() + NOTICE_S) * 1000)
        accepted, reason = GcsClient(address=self._cluster.address).drain_node(
            node.node_id, PREEMPTION, "reclaim", deadline_ms
        )
        assert accepted, reason
        self._end = threading.Timer(NOTICE_S, self._cluster.remove_node, (node,))
        self._end.start()


class Watch:
    """What could be seen in the folder of a run while it ran."""

    def __init__(self, work_dir):
        self.checkpoints = set()
        """Steps with a checkpoint."""
        self.starts = []
        """Steps from which ranks started; a start replaces metrics.jsonl."""

        self._work_dir = work_dir
        self._inode = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()

    def _look(self):
        metrics_file = self._work_dir / "metrics.jsonl"
        while not self._stop.wait(0.005):
            for folder in (self._work_dir / "train" / "sft").glob("checkpoint_0*"):
                self.checkpoints.add(int(folder.name.removeprefix("checkpoint_")))
            if metrics_file.exists() and metrics_file.stat().st_ino != self._inode:
                self._inode = metrics_file.stat().st_ino
                self.starts.append(len(metrics_file.read_text().splitlines()))


def train(tiny_folder, folder, on_step=None):
    return train_sft(
        examples=document_examples(TEXTS, make_tiny_tokenizer(), max_length=32),
        init_folder=tiny_folder,
        out_folder=folder / "out",
        sft=SFTConfig(
            num_steps=NUM_STEPS,
            batch_size=6,
            learning_rate=1e-3,
            # No checkpoint but the one that a notice asks for.
            checkpoint_every_steps=NUM_STEPS,
        ),
        runtime=RuntimeConfig(num_sft_workers=2, cpus_per_sft_worker=1.5, cpus_for_data=1),
        seed=0,
        work_dir=folder / "work",
        on_step=on_step,
    )


def test_a_reclaimed_run_saves_on_notice_and_moves_by_itself_to_the_same_weights(cluster, tmp_path):
    tiny_folder = make_tiny_model(tmp_path / "tiny", tie_word_embeddings=True)
    records = []
    reclaim = Reclaim(*cluster, step=60)

    def on_step(record):
        records.append(record)
        reclaim(record)

    with Watch(tmp_path / "work") as watch:
        result = train(tiny_folder, tmp_path, on_step)
    reclaim.wait()
    assert len(watch.checkpoints) == 1
    (saved,) = watch.checkpoints
    assert 60 < saved < NUM_STEPS
    # Nothing that was done before the notice is done again.
    assert len(watch.starts) == 2
    assert watch.starts[1] >= saved
    assert [record["step"] for record in records] == list(range(NUM_STEPS))
    lines = (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(NUM_STEPS))
    undisturbed = train(tiny_folder, tmp_path / "undisturbed")
    assert result.losses == undisturbed.losses
    weights = load_weights(tmp_path / "out")
    reference = load_weights(tmp_path / "undisturbed" / "out")
    assert all(torch.equal(weights[name], reference[name]) for name in reference)
