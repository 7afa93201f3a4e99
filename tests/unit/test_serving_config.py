"""Settings of the served policy, its token and its model folder. Nothing here starts Ray."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest
import yaml
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from past_ray.config.serving import PolicyAppArgs, ServingConfig
from past_ray.errors import ConfigError
from past_ray.serving.auth import BearerTokenMiddleware, read_token
from past_ray.serving.client import example_command
from past_ray.serving.model_folder import check_model_folder, read_model_record

TOKEN = "a-secret-of-this-test"


def test_an_unknown_key_is_refused_by_name():
    with pytest.raises(ValidationError, match="prot"):
        ServingConfig.model_validate({"prot": 8000})


def test_a_secret_pasted_as_variable_name_is_refused_and_not_repeated():
    with pytest.raises(ValidationError, match="token_env") as caught:
        ServingConfig(token_env="sk-12345")
    assert "12345" not in str(caught.value)


def test_two_token_sources_are_refused():
    with pytest.raises(ValidationError, match="at most one of token_env and token_file"):
        ServingConfig(token_env="TOKEN", token_file=Path("token"))


def test_an_open_address_needs_a_token():
    with pytest.raises(ValidationError, match="Set token_env or token_file"):
        ServingConfig(host="0.0.0.0")
    assert ServingConfig(host="0.0.0.0", token_env="TOKEN").host == "0.0.0.0"


def test_three_replicas_of_two_workers_with_half_a_cpu_demand_three_cpus():
    config = ServingConfig(num_replicas=3, tensor_parallel_size=2, cpus_per_worker=0.5)
    assert (config.demanded_cpus, config.demanded_gpus) == (3.0, 0)


def test_on_gpus_each_worker_demands_one():
    config = ServingConfig(accelerator="gpu", num_replicas=3, tensor_parallel_size=2)
    assert config.demanded_gpus == 6


def test_app_args_carry_every_engine_setting():
    config = ServingConfig(port=9000, model_id="adapted", max_model_len=64, token_env="TOKEN")
    args = config.app_args(Path("folder"))
    assert args == PolicyAppArgs(
        model_path=Path("folder"), model_id="adapted", max_model_len=64, token_env="TOKEN"
    )


def test_the_serve_yaml_validates():
    path = Path(__file__).parents[2] / "serve" / "policy.yaml"
    (application,) = yaml.safe_load(path.read_text())["applications"]
    assert application["import_path"] == "past_ray.serving.policy_app:build_app"
    args = PolicyAppArgs.model_validate(application["args"])
    assert args.model_path == Path("runs/demo/adapted")


def test_the_token_comes_from_the_named_variable(monkeypatch):
    monkeypatch.setenv("PAST_RAY_TEST_TOKEN", f"{TOKEN}\n")
    assert read_token(token_env="PAST_RAY_TEST_TOKEN", token_file=None) == TOKEN


def test_the_token_comes_from_the_named_file(tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(token_env=None, token_file=tmp_path / "token") == TOKEN


def test_a_missing_variable_is_named(monkeypatch):
    monkeypatch.delenv("PAST_RAY_TEST_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="PAST_RAY_TEST_TOKEN must hold the bearer token"):
        read_token(token_env="PAST_RAY_TEST_TOKEN", token_file=None)


def test_a_missing_token_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"the token file .*nowhere"):
        read_token(token_env=None, token_file=tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", " \n", "two words", "tab\tinside", "caf\u00e9"])
def test_what_cannot_be_a_token_is_refused_and_not_repeated(tmp_path, content):
    (tmp_path / "token").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="one word of printable ASCII") as caught:
        read_token(token_env=None, token_file=tmp_path / "token")
    assert not content.strip() or content.strip() not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "authorization", "status"),
    [
        ("/v1/models", None, 401),
        ("/v1/models", f"Bearer {TOKEN}", 200),
        ("/v1/models", f"bearer {TOKEN}", 200),
        ("/v1/models", f"Bearer {TOKEN}x", 401),
        ("/v1/models", f"Bearer {TOKEN[:-1]}", 401),
        ("/v1/models", f"Basic {TOKEN}", 401),
        ("/v1/models", TOKEN, 401),
        ("/v1/models", "Bearer ", 401),
        ("/v1/models", "Bearer caf\u00e9", 401),
        ("/health", None, 200),
        ("/health/", None, 401),
        ("/nowhere", None, 401),
        ("/nowhere", f"Bearer {TOKEN}", 404),
    ],
)
def test_only_the_right_token_opens_a_path(tmp_path, path, authorization, status):
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    assert _get(_guarded_app(tmp_path), path, headers).status_code == status


def test_the_refusal_has_openai_format_and_does_not_name_the_token(tmp_path):
    reply = _get(_guarded_app(tmp_path), "/v1/models", {"Authorization": "Bearer wrong"})
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert TOKEN not in reply.text


def test_without_a_configured_token_every_path_is_open():
    app = Starlette(routes=[Route("/v1/models", _answer)])
    app.add_middleware(BearerTokenMiddleware, token_env=None, token_file=None)
    assert _get(app, "/v1/models", {}).status_code == 200


def test_the_example_command_names_the_variable_and_quotes_the_question():
    command = example_command(
        "http://127.0.0.1:8000", "what's new ?", model_id="m", token_env="TOKEN", max_tokens=4
    )
    assert '-H "Authorization: Bearer $TOKEN"' in command
    assert "what'\"'\"'s new ?" in command


def test_a_complete_folder_is_accepted_as_absolute_path(tmp_path, monkeypatch):
    _fake_model_folder(tmp_path / "model", max_position_embeddings=64)
    monkeypatch.chdir(tmp_path)
    assert check_model_folder(Path("model"), max_model_len=64) == tmp_path / "model"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"found no folder .*nowhere"):
        check_model_folder(tmp_path / "nowhere", max_model_len=None)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("config.json", "config.json must be a readable JSON file"),
        ("model.safetensors", "must hold weights"),
        ("tokenizer.json", "must hold a tokenizer"),
    ],
)
def test_a_missing_part_of_the_model_is_named(tmp_path, name, complaint):
    _fake_model_folder(tmp_path, max_position_embeddings=64)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=complaint):
        check_model_folder(tmp_path, max_model_len=None)


def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path):
    _fake_model_folder(tmp_path, max_position_embeddings=64)
    with pytest.raises(ConfigError, match="at most the model's 64 positions, got 65"):
        check_model_folder(tmp_path, max_model_len=65)


def test_the_record_of_a_model_is_read(tmp_path):
    content = {"policy_version": 60, "scale": 1, "target_hash": "abc"}
    (tmp_path / "past_ray.json").write_text(json.dumps(content))
    record = read_model_record(tmp_path)
    assert (record.policy_version, record.skill_scale) == (60, 1.0)
    assert record.lineage == content


def test_a_model_without_record_has_an_unknown_origin(tmp_path):
    record = read_model_record(tmp_path)
    assert (record.policy_version, record.skill_scale, record.lineage) == (None, None, None)


@pytest.mark.parametrize("content", ['{"scale": "1"}', '{"policy_version": 1.5}', "[1]", "{"])
def test_a_malformed_record_is_refused_by_name(tmp_path, content):
    (tmp_path / "past_ray.json").write_text(content)
    with pytest.raises(ConfigError, match=r"past_ray\.json"):
        read_model_record(tmp_path)


async def _answer(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("answered")


def _guarded_app(folder: Path) -> Starlette:
    (folder / "token").write_text(TOKEN)
    app = Starlette(routes=[Route("/v1/models", _answer), Route("/health", _answer)])
    app.add_middleware(BearerTokenMiddleware, token_env=None, token_file=folder / "token")
    return app


def _get(app: Starlette, path: str, headers: dict) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


def _fake_model_folder(folder: Path, *, max_position_embeddings: int) -> None:
    folder.mkdir(exist_ok=True)
    config = {"model_type": "qwen2", "max_position_embeddings": max_position_embeddings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
