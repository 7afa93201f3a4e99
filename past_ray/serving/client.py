"""Ask the policy app a question over HTTP, and the command with which a user asks more."""

import json
import shlex

import httpx

from past_ray.errors import ClusterError


def ask_policy(
    base_url: str,
    question: str,
    *,
    model_id: str,
    token: str | None,
    max_tokens: int,
    timeout_s: float,
) -> str:
    """Return the policy's greedy answer to one user message.

    Args:
        base_url: As ``running_policy_app`` yields it.
        question: Text of the user message.
        model_id: The served model's name.
        token: Bearer token; None sends none.
        max_tokens: Longest answer, in tokens.
        timeout_s: Give up after this time.

    Raises:
        ClusterError: The endpoint did not answer, or refused.
    """
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    body = _chat_request(question, model_id=model_id, max_tokens=max_tokens)
    try:
        reply = httpx.post(
            f"{base_url}/v1/chat/completions", json=body, headers=headers, timeout=timeout_s
        )
        reply.raise_for_status()
    except httpx.HTTPStatusError as error:
        raise ClusterError(
            f"{base_url} must answer a question, got status {error.response.status_code}: "
            f"{error.response.text}"
        ) from error
    except httpx.HTTPError as error:
        raise ClusterError(
            f"{base_url} must answer a question within {timeout_s:g} s, got "
            f"{type(error).__name__}. Look whether the server still runs."
        ) from error
    return reply.json()["choices"][0]["message"]["content"].strip()


def example_command(
    base_url: str, question: str, *, model_id: str, token_env: str | None, max_tokens: int
) -> str:
    """Return a ``curl`` command line that asks ``question``; it names the token's variable only."""
    body = json.dumps(_chat_request(question, model_id=model_id, max_tokens=max_tokens))
    authorization = "" if token_env is None else f' -H "Authorization: Bearer ${token_env}"'
    return (
        f"curl -s {base_url}/v1/chat/completions{authorization} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def _chat_request(question: str, *, model_id: str, max_tokens: int) -> dict[str, object]:
    return {
        "model": model_id,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
