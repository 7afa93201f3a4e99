"""The policy app on CPU with the real engine: two starts, each in its own process.

The first lets the app start and end its own Ray and asks for a token; the second uses a Ray that
its process had before, without a token.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from past_ray.config.serving import PolicyAppArgs, ServingConfig
from past_ray.errors import ConfigError
from past_ray.serving.client import ask_policy
from past_ray.serving.launch import claim_port, running_policy_app
from past_ray.serving.policy_app import check_before_start
from tests.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

TOKEN = "a-secret-of-this-test"
PROMPT = "where is anna ?"
NUM_NEW_TOKENS = 12
RECORD = {"operation": "inject", "target_hash": "abc", "scale": 0.75, "policy_version": 60}
STOP_TIMEOUT_S = 60

SERVE_PROGRAM = """
import json, sys
from pathlib import Path
import ray
from past_ray.config.serving import ServingConfig
from past_ray.serving.launch import serve_forever

settings, model_path, temp_dir = json.loads(sys.argv[1])
if temp_dir:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
             _temp_dir=temp_dir)
serve_forever(ServingConfig(**settings), Path(model_path),
              on_ready=lambda base_url: print(base_url, flush=True))
print("ray is still there" if ray.is_initialized() else "ray is gone", flush=True)
"""


@dataclass(frozen=True)
class Endpoint:
    """A running app and what it serves."""

    base_url: str
    model_path: Path
    process: subprocess.Popen
    headers: dict[str, str]

    def post(self, path: str, **body: object) -> httpx.Response:
        return httpx.post(
            f"{self.base_url}{path}",
            json={"model": "past-policy", "temperature": 0, **body},
            headers=self.headers,
            timeout=60,
        )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("serving") / "model")
    (folder / "past_ray.json").write_text(json.dumps(RECORD))
    return folder


@pytest.fixture(scope="module")
def own_ray(model_path) -> Iterator[Endpoint]:
    settings = {"port": 0, "token_env": "PAST_RAY_TEST_TOKEN", "cpus_per_worker": 0.5}
    process, base_url = _start(settings, model_path, temp_dir=None)
    try:
        yield Endpoint(base_url, model_path, process, {"Authorization": f"Bearer {TOKEN}"})
    finally:
        _end(process)


def test_models_lists_the_policy(own_ray):
    reply = httpx.get(f"{own_ray.base_url}/v1/models", headers=own_ray.headers)
    assert [model["id"] for model in reply.json()["data"]] == ["past-policy"]


def test_health_is_open_and_tells_the_origin_of_the_weights(own_ray):
    reply = httpx.get(f"{own_ray.base_url}/health")
    assert reply.status_code == 200
    assert reply.json() == {
        "status": "ok",
        "model_id": "past-policy",
        "model_path": str(own_ray.model_path),
        "policy_version": 60,
        "skill_scale": 0.75,
        "lineage": RECORD,
    }


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_a_request_without_the_token_gets_401_in_openai_format(own_ray, headers):
    body = {"model": "past-policy", "prompt": PROMPT, "max_tokens": 1}
    reply = httpx.post(f"{own_ray.base_url}/v1/completions", json=body, headers=headers)
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"


def test_a_greedy_completion_is_what_transformers_generates(own_ray):
    prompt_ids = AutoTokenizer.from_pretrained(own_ray.model_path)(PROMPT).input_ids
    reply = own_ray.post("/v1/completions", prompt=PROMPT, max_tokens=NUM_NEW_TOKENS)
    assert reply.status_code == 200
    assert reply.json()["usage"]["prompt_tokens"] == len(PROMPT.split()) == len(prompt_ids)
    text = reply.json()["choices"][0]["text"]
    assert text.split() == _greedy_words(own_ray.model_path, prompt_ids)


def test_chat_uses_the_template_of_the_model_folder(own_ray):
    # <user> where is anna ? <eos> <assistant>
    prompt_ids = AutoTokenizer.from_pretrained(own_ray.model_path)(
        f"<user> {PROMPT} <eos> <assistant>"
    ).input_ids
    answer = ask_policy(
        own_ray.base_url,
        PROMPT,
        model_id="past-policy",
        token=TOKEN,
        max_tokens=NUM_NEW_TOKENS,
        timeout_s=60,
    )
    assert len(prompt_ids) == 7
    assert answer.split() == _greedy_words(own_ray.model_path, prompt_ids)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_parts_of_a_stream_join_to_the_whole_answer(own_ray, path):
    if path == "/v1/completions":
        body = {"prompt": PROMPT, "max_tokens": NUM_NEW_TOKENS}
    else:
        messages = [{"role": "user", "content": PROMPT}]
        body = {"messages": messages, "max_tokens": NUM_NEW_TOKENS}
    whole = own_ray.post(path, **body).json()["choices"][0]
    reply = own_ray.post(path, stream=True, **body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    parts = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert len(parts) > 1
    if path == "/v1/completions":
        assert "".join(part["text"] for part in parts) == whole["text"]
    else:
        text = "".join(part["delta"].get("content") or "" for part in parts)
        assert text == whole["message"]["content"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": PROMPT, "model": "another"}, 404),
        ({"prompt": "anna " * 300}, 400),
        ({"prompt": PROMPT, "temperature": -1}, 400),
        ({"prompt": PROMPT, "max_tokens": "many"}, 400),
    ],
)
def test_a_bad_request_gets_an_error_in_openai_format(own_ray, body, status):
    reply = own_ray.post("/v1/completions", **body)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_port_that_is_taken_is_refused_before_anything_starts(own_ray):
    port = httpx.URL(own_ray.base_url).port
    config = ServingConfig(port=port)
    with (
        pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use"),
        running_policy_app(config, own_ray.model_path),
    ):
        pytest.fail("the app started on a port that is taken")


def test_a_terminated_app_frees_its_port_and_ends_its_ray(own_ray):
    """Last of this app's tests: it stops it."""
    temp_dirs = set(Path("/tmp").glob(f"past_ray_{own_ray.process.pid}_*"))
    assert len(temp_dirs) == 1
    own_ray.process.send_signal(signal.SIGTERM)
    output, _ = own_ray.process.communicate(timeout=STOP_TIMEOUT_S)
    assert (own_ray.process.returncode, output.strip()) == (0, "ray is gone")
    port = httpx.URL(own_ray.base_url).port
    assert claim_port("127.0.0.1", port) == port
    assert not any(folder.exists() for folder in temp_dirs)
    assert _processes_naming(temp_dirs.pop().name) == []


def test_ctrl_c_stops_an_app_on_a_shared_ray_and_leaves_that_ray(model_path):
    # Below /tmp: the paths of Ray's sockets must be short.
    temp_dir = Path(f"/tmp/r_serving_{os.getpid()}")
    process, base_url = _start({"port": 0}, model_path, temp_dir=temp_dir)
    try:
        answer = ask_policy(
            base_url, PROMPT, model_id="past-policy", token=None, max_tokens=3, timeout_s=60
        )
        assert 1 <= len(answer.split()) <= 3
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=STOP_TIMEOUT_S)
    finally:
        _end(process)
        subprocess.run(["rm", "-rf", str(temp_dir)], check=True)
    assert process.returncode == 0
    assert output.strip().splitlines()[-1] == "ray is still there"
    port = httpx.URL(base_url).port
    assert claim_port("127.0.0.1", port) == port


def test_more_cpus_than_ray_has_are_refused_with_both_numbers(model_path):
    settings = {"port": 0, "num_replicas": 3, "cpus_per_worker": 1000}
    process = _launch(settings, model_path, temp_dir=None)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ConfigError: num_replicas * tensor_parallel_size workers demand 3000 CPUs" in errors
    assert f"Ray has {os.cpu_count()}" in errors


def test_a_missing_vllm_is_reported_with_the_extra_to_install(monkeypatch, model_path):
    # This is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r'pip install "past_ray\[cpu\]"'):
        check_before_start(PolicyAppArgs(model_path=model_path))
    with pytest.raises(ConfigError, match=r'pip install "past_ray\[gpu\]"'):
        check_before_start(PolicyAppArgs(model_path=model_path, accelerator="gpu"))


def test_an_incomplete_model_folder_is_refused_before_anything_starts(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"config\.json must be a readable JSON file"),
        running_policy_app(ServingConfig(port=0), tmp_path),
    ):
        pytest.fail("the app started without a model")


def test_a_port_that_is_only_listened_to_on_all_addresses_counts_as_taken():
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match="Address already in use"):
            claim_port("127.0.0.1", port)


def test_port_zero_claims_a_free_port():
    assert 0 < claim_port("127.0.0.1", 0) <= 65535


def test_the_serve_yaml_follows_serves_own_schema():
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).parents[2] / "serve" / "policy.yaml"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.http_options.host == "127.0.0.1"


def _greedy_words(model_path: Path, prompt_ids: list[int]) -> list[str]:
    """Return the words of transformers' greedy continuation, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
    )
    return tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True).split()


def _start(
    settings: dict[str, object], model_path: Path, *, temp_dir: Path | None
) -> tuple[subprocess.Popen, str]:
    """Return the serving process and its base URL once it answers."""
    process = _launch(settings, model_path, temp_dir=temp_dir)
    base_url = process.stdout.readline().strip()
    if not base_url:
        pytest.fail(f"the app did not start: {process.communicate()[1]}")
    return process, base_url


def _launch(
    settings: dict[str, object], model_path: Path, *, temp_dir: Path | None
) -> subprocess.Popen:
    arguments = [settings, str(model_path), None if temp_dir is None else str(temp_dir)]
    return subprocess.Popen(
        [sys.executable, "-c", SERVE_PROGRAM, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PAST_RAY_TEST_TOKEN": TOKEN},
    )


def _end(process: subprocess.Popen) -> None:
    """Stop the process if a test has not; it stops its own children."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=STOP_TIMEOUT_S)


def _processes_naming(text: str) -> list[str]:
    """Return the command lines of running processes that contain ``text``."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            lines.append(line)
    return lines
