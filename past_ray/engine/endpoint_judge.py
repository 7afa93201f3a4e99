"""A judge behind an OpenAI-compatible endpoint.

What happens to an attempt::

    200 with yes or no                      verdict, written to the cache
    200 with anything else                  again, later
    429, 503 with Retry-After               everybody waits that long, then again
    408, 429, 5xx, no connection, a hang    again, after 0.5 s, 1 s, 2 s, ...
    401, 404                                failure; this judge asks no more
    other 4xx                               failure

The key is read once from the environment. It appears in no log, error or cache file.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx

from past_ray.config.judge import EndpointJudgeConfig
from past_ray.engine.endpoint_pace import Pace, retry_after_s
from past_ray.engine.verdict_cache import VerdictCache
from past_ray.errors import ConfigError
from past_ray.tasks.judging import (
    JudgeFailure,
    JudgeItem,
    JudgeOutcome,
    JudgeStats,
    judge_distinct,
    judge_messages,
    verdict_outcome,
)

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
"""Wait before the first retry; doubles with each further one."""

MAX_BACKOFF_S = 30.0
"""Longest such wait."""

MAX_RETRY_AFTER_S = 300.0
"""An endpoint that wants a longer pause gets a failure instead of a sleeping run."""

MAX_TEXT_CHARS = 200
"""How much of an endpoint's error is repeated."""


class _AttemptError(Exception):
    """One attempt failed; ``can_retry`` tells whether another one makes sense."""

    def __init__(self, text: str, *, can_retry: bool, wait_s: float | None = None) -> None:
        super().__init__(text)
        self.can_retry = can_retry
        self.wait_s = wait_s


class EndpointJudge:
    """Asks an endpoint for yes or no. Its limits, cache and counts hold over all threads."""

    def __init__(self, config: EndpointJudgeConfig) -> None:
        """Read the key; nothing is asked yet.

        Raises:
            ConfigError: The variable of the key is unset or empty.
        """
        self._config = config
        self._key = _read_key(config.api_key_env)
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=config.max_concurrent)
        self._client = httpx.Client(headers=headers, timeout=config.timeout_s, limits=limits)
        self._cache = VerdictCache(config.cache_dir)
        self._pace = Pace(60.0 / config.requests_per_minute)
        self._threads = ThreadPoolExecutor(config.max_concurrent, thread_name_prefix="judge")
        # A wrong key, or a missing address or model: true for every other item too.
        self._refusal = ""
        self._lock = threading.Lock()
        self._stats = JudgeStats()

    def judge(self, items: Sequence[JudgeItem]) -> list[JudgeOutcome]:
        """Return one outcome per item, in order; equal items are asked once.

        Raises:
            StorageError: The cache cannot be written.
        """
        outcomes = judge_distinct(items, self._ask_all)
        self._count(num_failures=sum(isinstance(entry, JudgeFailure) for entry in outcomes))
        return outcomes

    def stats(self) -> JudgeStats:
        """Return counts and cost since the judge was built.

        An endpoint that reports no usage costs nothing here.
        """
        with self._lock:
            stats = self._stats
        input_cost = stats.num_input_tokens * self._config.price_per_million_input
        output_cost = stats.num_output_tokens * self._config.price_per_million_output
        return replace(stats, cost=(input_cost + output_cost) / 1e6)

    def close(self) -> None:
        """Stop asking: what is waiting becomes a failure."""
        self._pace.stop()
        self._threads.shutdown()
        self._client.close()

    def _ask_all(self, items: Sequence[JudgeItem]) -> list[JudgeOutcome]:
        futures = [self._threads.submit(self._ask, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            # After Ctrl-C or a full disk the rest must not be paid for.
            for future in futures:
                future.cancel()

    def _ask(self, item: JudgeItem) -> JudgeOutcome:
        """Look into the cache, then ask until there is a verdict or no point in going on."""
        body = {
            "model": self._config.model,
            "messages": list(judge_messages(item)),
            "max_tokens": self._config.max_new_tokens,
            "temperature": 0,
        }
        request = {"url": self._url, **body}
        if (cached := self._cache.get(request)) is not None:
            self._count(num_cache_hits=1)
            return verdict_outcome(cached)
        attempt = 0
        while True:
            try:
                reply = self._attempt(body, is_retry=attempt > 0)
            except _AttemptError as error:
                if not error.can_retry or attempt == self._config.max_retries:
                    return JudgeFailure(error=f"{self._url} {error} (attempt {attempt + 1})")
                logger.debug("%s %s (attempt %d)", self._url, error, attempt + 1)
                if error.wait_s is None:
                    self._pace.sleep(min(FIRST_BACKOFF_S * 2**attempt, MAX_BACKOFF_S))
                else:
                    self._pace.pause_all(error.wait_s)
            else:
                self._cache.put(request, reply)
                return verdict_outcome(reply)
            attempt += 1

    def _attempt(self, body: dict[str, Any], *, is_retry: bool) -> str:
        """Send one request at its time and return what the model said."""
        is_open = self._pace.wait_for_turn()
        if self._refusal:
            raise _AttemptError(self._refusal, can_retry=False)
        if not is_open:
            raise _AttemptError("the judge was closed before it answered", can_retry=False)
        self._count(num_calls=1, num_retries=int(is_retry))
        try:
            status, headers, text = self._post(body)
        except httpx.HTTPError as error:
            # Its text may repeat headers; its class says enough.
            raise _AttemptError(
                f"must answer within {self._config.timeout_s:g} s, got {type(error).__name__}. "
                "Look whether it still runs, or raise timeout_s.",
                can_retry=True,
            ) from error
        if status != 200:
            raise self._refused(status, headers, text)
        return self._read(text)

    def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, str]:
        """Return status, headers and text; httpx limits each read, this limits their sum."""
        deadline = time.monotonic() + self._config.timeout_s
        with self._client.stream("POST", self._url, json=body) as response:
            content = bytearray()
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer took too long in all")
        return response.status_code, response.headers, content.decode(errors="replace")

    def _refused(self, status: int, headers: httpx.Headers, text: str) -> _AttemptError:
        """Say what a status other than 200 means for this item and for the others."""
        message = f"must answer, got status {status}: {self._excerpt(text)}."
        if status == 401:
            source = self._config.api_key_env
            hint = f"Put a valid key into {source}." if source else "Name its key in api_key_env."
            message = self._refusal = f"{message} {hint}"
        elif status == 404:
            message = self._refusal = f"{message} Correct base_url or model."
        can_retry = status in (408, 429) or status >= 500
        wait_s = retry_after_s(headers.get("Retry-After")) if can_retry else None
        if wait_s is not None and wait_s > MAX_RETRY_AFTER_S:
            message = f"{message} It wants a pause of {wait_s:.0f} s. Run again after it."
            can_retry = False
        return _AttemptError(message, can_retry=can_retry, wait_s=wait_s)

    def _read(self, text: str) -> str:
        """Return the model's words from a response, if they are a verdict."""
        try:
            content: Any = json.loads(text)
            usage = content.get("usage") or {}
            self._count(
                num_input_tokens=int(usage.get("prompt_tokens") or 0),
                num_output_tokens=int(usage.get("completion_tokens") or 0),
            )
            reply = str(content["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _AttemptError(
                f"must return choices[0].message.content, got {self._excerpt(text)}. Look whether "
                "base_url is that of an OpenAI-compatible endpoint.",
                can_retry=True,
            ) from error
        outcome = verdict_outcome(reply)
        if isinstance(outcome, JudgeFailure):
            raise _AttemptError(f"gave no verdict: {outcome.error}", can_retry=True)
        return reply

    def _count(self, **amounts: int) -> None:
        with self._lock:
            before = self._stats
            sums = {name: getattr(before, name) + number for name, number in amounts.items()}
            self._stats = replace(before, **sums)

    def _excerpt(self, text: str) -> str:
        """Return the start of a server's text; a server may repeat the key."""
        visible = text.replace(self._key, "***") if self._key else text
        return repr(" ".join(visible.split())[:MAX_TEXT_CHARS])


def _read_key(api_key_env: str | None) -> str:
    if api_key_env is None:
        return ""
    key = os.environ.get(api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"the environment variable {api_key_env} must hold the judge's key, found it unset or "
            "unusable. Export it where the judge runs, or leave out api_key_env."
        )
    return key
