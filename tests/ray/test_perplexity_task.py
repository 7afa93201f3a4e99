"""Texts scored by several models on a real Ray."""

import pytest

from past_ray.engine.perplexity import token_nll
from past_ray.errors import ClusterError, ConfigError
from past_ray.runtime.perplexity_task import token_nll_of_models
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

TEXTS = ["anna lives in berlin .", "ben owns a cat and a dog ."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: make_tiny_model(tmp_path_factory.mktemp(name), seed=seed)
        for seed, name in enumerate(["before", "after"])
    }


def score(folders, **options):
    options = {
        "max_length": 64,
        "batch_tokens": 64,
        "resources": {"CPU": 1.0, "GPU": 0.0},
        **options,
    }
    return token_nll_of_models(folders, TEXTS, **options)


def test_each_model_gets_the_figures_it_has_in_this_process(cluster, folders):
    expected = {
        name: token_nll(folder, TEXTS, max_length=64, batch_tokens=64, device="cpu")
        for name, folder in folders.items()
    }
    found = score(folders)
    assert list(found) == ["before", "after"]
    assert found["before"] != found["after"]
    for name, result in found.items():
        assert result.nll == pytest.approx(expected[name].nll, rel=1e-5)
        assert result.num_scored == expected[name].num_scored


def test_an_error_of_ours_arrives_as_itself(cluster, folders):
    with pytest.raises(ConfigError, match="from 2 to the 256"):
        score(folders, max_length=1)


def test_a_folder_that_no_node_sees_is_a_cluster_error(cluster, folders, tmp_path):
    with pytest.raises(ClusterError, match="sees the model folders"):
        score({**folders, "lost": tmp_path / "missing"})
