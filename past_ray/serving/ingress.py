"""The HTTP side of the policy app: OpenAI's routes, ``/health`` and errors in OpenAI's format.

Importing this module imports ``ray.serve.llm`` and with it vLLM, which takes seconds.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from ray.exceptions import RayError
from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard, OpenAIHTTPException
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from past_ray.serving.auth import BearerTokenMiddleware, read_token
from past_ray.serving.model_folder import ModelRecord

logger = logging.getLogger(__name__)

ENGINE_HEALTH_TIMEOUT_S = 5.0
"""An engine that does not say within this time that it is well counts as unavailable."""

ENDPOINTS: dict[str, Callable[[FastAPI], Any]] = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "health": lambda app: app.get("/health"),
}
"""Method of ``PolicyIngress`` and its route. What is not listed is not served."""


class PolicyIngress(OpenAiIngress):
    """OpenAI's routes for one model, plus ``/health``."""

    def __init__(
        self,
        llm_deployments: dict[str, DeploymentHandle[Any]],
        model_cards: dict[str, ModelCard],
        *,
        model_path: Path,
        record: ModelRecord,
        token_env: str | None,
        token_file: Path | None,
    ) -> None:
        # A replica that could not check tokens must fail here, not at the first request.
        read_token(token_env=token_env, token_file=token_file)
        super().__init__(llm_deployments, model_cards)
        ((self._model_id, self._engine),) = llm_deployments.items()
        self._model_path = model_path
        self._record = record

    async def health(self) -> JSONResponse:
        """Say which weights are served; status 503 while the engine does not answer."""
        is_well = await self._is_engine_well()
        content = {
            "status": "ok" if is_well else "unavailable",
            "model_id": self._model_id,
            "model_path": str(self._model_path),
            "policy_version": self._record.policy_version,
            "skill_scale": self._record.skill_scale,
            "lineage": self._record.lineage,
        }
        return JSONResponse(content, status_code=200 if is_well else 503)

    async def _is_engine_well(self) -> bool:
        try:
            async with asyncio.timeout(ENGINE_HEALTH_TIMEOUT_S):
                await self._engine.check_health.remote()
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("the engine is unavailable: %s", type(error).__name__)
            return False
        return True


def build_http_app(*, token_env: str | None, token_file: Path | None) -> FastAPI:
    """Return an empty FastAPI application with the token check and OpenAI-style errors."""
    app = FastAPI(title="past-ray policy", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BearerTokenMiddleware, token_env=token_env, token_file=token_file)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(OpenAIHTTPException, _answer_engine_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_exception_handler(Exception, _answer_unexpected_error)
    return app


async def _answer_http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail)


async def _answer_engine_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OpenAIHTTPException)
    return _error(error.status_code, error.message)


async def _answer_invalid_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _error(400, f"{where}: {first['msg']}")


async def _answer_unexpected_error(_request: Request, _raised: Exception) -> JSONResponse:
    return _error(500, "The server failed to answer this request; its log says why.")


def _error(status_code: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status_code < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": status_code}
    return JSONResponse({"error": error}, status_code=status_code)
