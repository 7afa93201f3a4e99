"""The bearer token: where it comes from and who must show it.

Protected: every HTTP path of the application except ``/health``, before the body is read.
Not protected: Serve's own ``/-/healthz`` and ``/-/routes`` (they name the application, nothing
more), and the traffic itself, which is plain HTTP: put TLS in front when it leaves the machine.
The token never travels through Ray: each replica reads it from its own node.
"""

import hmac
import os
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from past_ray.errors import ConfigError

OPEN_PATHS = ("/health",)
"""Answered without a token."""


def read_token(*, token_env: str | None, token_file: Path | None) -> str | None:
    """Return the configured bearer token, or None when none is configured.

    Args:
        token_env: Name of the environment variable that holds it.
        token_file: File that holds it; surrounding white space is not part of the token.

    Raises:
        ConfigError: The variable or file is missing, or its content cannot be a token.
    """
    if token_env is not None:
        source = f"the environment variable {token_env}"
        token = os.environ.get(token_env)
        if token is None:
            raise ConfigError(
                f"{source} must hold the bearer token, found it unset. Export it before Ray "
                "starts on every node, or remove token_env to serve without a token."
            )
    elif token_file is not None:
        source = f"the token file {token_file}"
        token = _read_token_file(token_file)
    else:
        return None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{source} must hold one word of printable ASCII, found something else or nothing. "
            "Write a token there, for example the output of `openssl rand -hex 32`."
        )
    return token


class BearerTokenMiddleware:
    """Answers 401 to requests without the right token; the body of such a request is never read.

    The token is read when a replica builds its middleware, so a replica without it never starts.
    """

    def __init__(self, app: ASGIApp, *, token_env: str | None, token_file: Path | None) -> None:
        self._app = app
        token = read_token(token_env=token_env, token_file=token_file)
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "lifespan" or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _unauthorized()(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path in OPEN_PATHS:
            return True
        credentials = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(credentials) != 1:
            return False
        scheme, _, token = credentials[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


def _read_token_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the token file {path} must be a readable text file, found: "
            f"{type(error).__name__}. Create it, readable by the serving user only."
        ) from error


def _unauthorized() -> JSONResponse:
    error = {
        "message": "A valid bearer token is required: Authorization: Bearer <token>.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse({"error": error}, status_code=401, headers=headers)
