"""Models of the hub, from a hub on loopback that serves a tiny one."""

import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

from past_ray.config.experiment import ExperimentConfig
from past_ray.config.loading import load_config
from past_ray.config.model import HubModelConfig
from past_ray.engine import model_sources
from past_ray.engine.model_cache import cached_base
from past_ray.engine.model_sources import obtain_model
from past_ray.errors import ConfigError
from past_ray.skill.checkpoint import hash_weights
from tests.tiny_model import make_tiny_model

NAME = "someone/tiny"
MODEL = HubModelConfig(name=NAME)
COMMIT = "c0ffee" + "0" * 34
DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"


class Hub(BaseHTTPRequestHandler):
    """The three calls of a download: about the model, its files, and one file."""

    def do_GET(self):
        path = urlsplit(self.path).path
        files = [file for file in self.server.folder.rglob("*") if file.is_file()]
        names = {file.relative_to(self.server.folder).as_posix(): file for file in files}
        if path == f"/api/models/{NAME}/revision/main":
            siblings = [{"rfilename": name} for name in names]
            self._answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            sizes = {name: file.stat().st_size for name, file in names.items()}
            tree = [
                {"type": "file", "path": name, "size": size, "oid": name}
                for name, size in sizes.items()
            ]
            self._answer(json.dumps(tree).encode())
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            name = path.split(COMMIT + "/")[1]
            self.server.fetched.add(name)
            self._answer(names[name].read_bytes(), etag=name)
        else:
            self._answer(b"", status=404, error="RepoNotFound")

    do_HEAD = do_GET

    def _answer(self, content, *, status=200, etag="x", error=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format, *args):
        pass


def point_to_hub(monkeypatch, endpoint):
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("PAST_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(name="hub")
def hub_fixture(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.fetched = make_tiny_model(tmp_path / "published"), set()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    point_to_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_model_has_the_published_weights_and_is_downloaded_once(hub):
    folder = obtain_model(MODEL)
    assert folder == cached_base(MODEL)
    assert hash_weights(folder) == hash_weights(hub.folder)
    hub.fetched.clear()
    assert obtain_model(MODEL) == folder
    assert hub.fetched == set()


def test_only_safetensors_config_and_tokenizer_are_fetched(hub):
    wanted = {file.name for file in hub.folder.iterdir()}
    (hub.folder / "original").mkdir()
    for name in ("pytorch_model.bin", "README.md", "consolidated.safetensors", "model.py"):
        (hub.folder / name).write_text("x")
        (hub.folder / "original" / name).write_text("x")
    folder = obtain_model(MODEL)
    assert hub.fetched == wanted
    assert {file.name for file in folder.iterdir()} == wanted


def test_a_hub_model_of_pickles_is_refused_before_anything_is_fetched(hub):
    (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"must have safetensors.*pytorch_model\.bin"):
        obtain_model(MODEL)
    assert hub.fetched == set()
    assert not cached_base(MODEL).exists()


def test_a_hub_model_without_a_chat_template_leaves_nothing_in_the_cache(hub):
    (hub.folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="chat template"):
        obtain_model(MODEL)
    assert not cached_base(MODEL).is_symlink()


def test_a_name_the_hub_does_not_know_is_refused_with_what_to_check(hub):
    with pytest.raises(ConfigError, match=r"no/such.*Check the spelling.*hf auth login.*folder"):
        obtain_model(HubModelConfig(name="no/such"))


def test_without_the_hub_its_complete_cache_serves_and_an_incomplete_one_does_not(hub, monkeypatch):
    folder = obtain_model(MODEL)
    point_to_hub(monkeypatch, "http://127.0.0.1:9")
    folder.unlink()
    assert hash_weights(obtain_model(MODEL)) == hash_weights(hub.folder)
    (folder / "model.safetensors").unlink()
    folder.unlink()
    with pytest.raises(ConfigError, match="must be reachable"):
        obtain_model(MODEL)


def test_a_link_whose_snapshot_was_deleted_is_made_again(hub, tmp_path):
    folder = obtain_model(MODEL)
    shutil.rmtree(tmp_path / "hub_cache")
    assert not folder.exists()
    assert hash_weights(obtain_model(MODEL)) == hash_weights(hub.folder)


def test_an_unreachable_hub_is_a_config_error_that_says_how_to_give_a_folder(monkeypatch):
    point_to_hub(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"must be reachable.*give its folder instead"):
        obtain_model(MODEL)


def test_offline_mode_is_a_config_error_that_names_its_variable(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"unset HF_HUB_OFFLINE.*give its folder instead"):
        obtain_model(MODEL)


@pytest.mark.timeout(30)
def test_a_hub_that_accepts_and_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(model_sources, "HUB_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConfigError, match="must be reachable"):
            obtain_model(MODEL)


def test_a_hub_model_can_be_the_base_of_a_real_task_but_not_of_the_world():
    hub = "model={kind: hub, name: someone/tiny}"
    assert load_config(ExperimentConfig, DEMO.with_name("demo-squad.yaml"), [hub]).model == MODEL
    with pytest.raises(ConfigError, match=r"task\.kind world needs model\.kind scratch"):
        load_config(ExperimentConfig, DEMO, [hub])
    with pytest.raises(ConfigError, match=r"model\.name"):
        load_config(ExperimentConfig, DEMO, ["model={kind: hub, name: tiny}"])
