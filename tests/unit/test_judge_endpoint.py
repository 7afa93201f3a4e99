"""The endpoint judge against a real HTTP server that misbehaves on purpose."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from past_ray.config.judge import EndpointJudgeConfig
from past_ray.engine.judge import build_judge
from past_ray.errors import ConfigError, StorageError
from past_ray.tasks.judging import JudgeFailure, JudgeItem, judge_messages

KEY = "sk-very-secret"


def said(text, *, tokens=(100, 2)):
    """The body of a completion, as OpenAI writes it."""
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


class Endpoint:
    """A server that plays its ``replies`` in order, then the last one for ever.

    A reply is ``(status, headers, body)``; a body is JSON, text, or a number of seconds to hang.
    """

    def __init__(self, *replies):
        self.replies = list(replies)
        self.requests = []
        self.times = []
        self.num_open = 0
        self.max_open = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                with endpoint.lock:
                    endpoint.times.append(time.monotonic())
                    endpoint.requests.append((self.path, dict(self.headers), json.loads(content)))
                    endpoint.num_open += 1
                    endpoint.max_open = max(endpoint.max_open, endpoint.num_open)
                    several = len(endpoint.replies) > 1
                    reply = endpoint.replies.pop(0) if several else endpoint.replies[0]
                status, headers, body = reply(json.loads(content)) if callable(reply) else reply
                try:
                    self.answer(status, headers, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                with endpoint.lock:
                    endpoint.num_open -= 1

            def answer(self, status, headers, body):
                if isinstance(body, float):
                    endpoint.ended.wait(body)
                    body = said("yes")
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if "X-Drip" in headers:
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        endpoint.ended.wait(0.1)
                else:
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # With 5 waiting at most, a burst is reset, and retried.

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self):
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    opened = []

    def start(*replies):
        opened.append(Endpoint(*replies))
        return opened[-1]

    yield start
    for endpoint in opened:
        endpoint.close()


@pytest.fixture
def judge_for():
    built = []

    def build(endpoint, **settings):
        defaults = {
            "base_url": endpoint.base_url,
            "model": "gpt",
            "api_key_env": "JUDGE_KEY",
            "requests_per_minute": 60_000,
            "timeout_s": 5.0,
            "max_retries": 2,
        }
        built.append(build_judge(EndpointJudgeConfig(**(defaults | settings))))
        return built[-1]

    yield build
    for judge in built:
        judge.close()


def item(answer="oslo", *, gold="oslo"):
    return JudgeItem(question="where ?", gold=gold, answer=answer)


OK = (200, {}, said("yes"))
BROKEN = (500, {}, "oops")


def test_the_request_is_a_greedy_chat_completion_with_the_key(serve, judge_for):
    endpoint = serve(OK)
    (verdict,) = judge_for(endpoint).judge([item()])
    assert (verdict.score, verdict.is_correct, verdict.explanation) == (1.0, True, "yes")
    path, headers, body = endpoint.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "gpt",
        "messages": list(judge_messages(item())),
        "max_tokens": 16,
        "temperature": 0,
    }


def test_without_a_variable_no_key_is_sent(serve, judge_for):
    endpoint = serve(OK)
    judge_for(endpoint, api_key_env=None).judge([item()])
    assert "Authorization" not in endpoint.requests[0][1]


def test_each_item_gets_its_own_verdict_in_order(serve, judge_for):
    def by_answer(body):
        is_right = '"oslo' in body["messages"][0]["content"].split("Answer to judge: ")[1]
        time.sleep(0.02 if is_right else 0)
        return 200, {}, said("Yes." if is_right else "No.")

    answers = ["oslo a", "rome", "oslo b", "paris", "", "oslo c"]
    verdicts = judge_for(serve(by_answer)).judge([item(answer) for answer in answers])
    assert [verdict.score for verdict in verdicts] == [1, 0, 1, 0, 0, 1]


def test_a_429_is_repeated_after_the_time_it_asks_for(serve, judge_for):
    endpoint = serve((429, {"Retry-After": "1"}, "slow down"), OK)
    judge = judge_for(endpoint)
    (verdict,) = judge.judge([item()])
    assert verdict.is_correct
    assert endpoint.times[1] - endpoint.times[0] >= 1.0
    stats = judge.stats()
    assert (stats.num_calls, stats.num_retries, stats.num_failures) == (2, 1, 0)


def test_a_429_that_wants_a_long_pause_is_a_failure_and_not_asked_sooner(serve, judge_for):
    endpoint = serve((429, {"Retry-After": "3600"}, "tomorrow"))
    (failure,) = judge_for(endpoint).judge([item()])
    assert isinstance(failure, JudgeFailure)
    assert "wants a pause of 3600 s" in failure.error
    assert len(endpoint.requests) == 1


def test_a_500_is_repeated(serve, judge_for):
    (verdict,) = judge_for(serve(BROKEN, OK)).judge([item()])
    assert verdict.is_correct


def test_500_for_ever_is_a_failure_after_all_attempts_and_no_zero(serve, judge_for):
    endpoint = serve(BROKEN)
    judge = judge_for(endpoint)
    (failure,) = judge.judge([item()])
    assert isinstance(failure, JudgeFailure)
    assert "status 500: 'oops'" in failure.error
    assert "attempt 3" in failure.error
    assert len(endpoint.requests) == 3
    # 0.5 s, then 1 s.
    gaps = [endpoint.times[1] - endpoint.times[0], endpoint.times[2] - endpoint.times[1]]
    assert gaps[0] >= 0.5
    assert gaps[1] >= 1.0
    stats = judge.stats()
    assert (stats.num_calls, stats.num_retries, stats.num_failures) == (3, 2, 1)


@pytest.mark.parametrize(
    "body",
    ["<html>", "[]", {"choices": []}, {"choices": [{"message": {"content": None}}]}, {"usage": 3}],
)
def test_garbage_is_repeated_and_then_a_failure(serve, judge_for, body):
    garbage = (200, {}, body)
    assert judge_for(serve(garbage, OK)).judge([item()])[0].is_correct
    endpoint = serve(garbage)
    (failure,) = judge_for(endpoint, max_retries=1).judge([item()])
    assert isinstance(failure, JudgeFailure)
    assert len(endpoint.requests) == 2


def test_words_that_are_no_verdict_are_repeated_and_then_a_failure(serve, judge_for):
    unsure = (200, {}, said("perhaps"))
    assert judge_for(serve(unsure, OK)).judge([item()])[0].is_correct
    (failure,) = judge_for(serve(unsure), max_retries=1).judge([item()])
    assert isinstance(failure, JudgeFailure)
    assert "perhaps" in failure.error


@pytest.mark.parametrize("headers", [{}, {"X-Drip": "1"}])
def test_a_hang_ends_in_time_also_when_bytes_drip(serve, judge_for, headers):
    endpoint = serve((200, headers, 60.0 if not headers else said("yes")))
    started = time.monotonic()
    (failure,) = judge_for(endpoint, timeout_s=0.5, max_retries=0).judge([item()])
    assert isinstance(failure, JudgeFailure)
    assert "must answer within 0.5 s, got ReadTimeout" in failure.error
    assert time.monotonic() - started < 3


def test_nobody_listening_is_a_failure(serve, judge_for):
    endpoint = serve(OK)
    judge = judge_for(endpoint, max_retries=0)
    endpoint.server.server_close()
    (failure,) = judge.judge([item()])
    assert isinstance(failure, JudgeFailure)
    assert "Look whether it still runs" in failure.error


def test_a_wrong_key_is_asked_once_for_all_items_and_says_where_it_comes_from(serve, judge_for):
    endpoint = serve((401, {}, {"error": f"Incorrect API key provided: {KEY}"}))
    judge = judge_for(endpoint, max_concurrent=1)
    outcomes = judge.judge([item(f"answer {index}") for index in range(20)])
    assert all(isinstance(outcome, JudgeFailure) for outcome in outcomes)
    assert "status 401" in outcomes[-1].error
    assert "Put a valid key into JUDGE_KEY" in outcomes[-1].error
    assert len(endpoint.requests) == 1
    assert judge.stats().num_failures == 20


def test_a_request_that_is_refused_for_its_content_is_not_repeated(serve, judge_for):
    endpoint = serve((400, {}, "too long"), OK)
    judge = judge_for(endpoint)
    assert isinstance(judge.judge([item("a")])[0], JudgeFailure)
    assert judge.judge([item("b")])[0].is_correct
    assert len(endpoint.requests) == 2


def test_the_key_is_in_no_error_log_or_cache_file(serve, judge_for, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    leak = {"error": f"key {KEY} is wrong"}
    judge = judge_for(serve((500, {}, leak), (200, {}, said("yes"))), cache_dir=tmp_path)
    judge.judge([item("a")])
    refused = judge_for(serve((401, {}, leak))).judge([item("b")])
    assert KEY not in refused[0].error
    assert "***" in refused[0].error
    assert KEY not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert all(KEY not in path.read_text() for path in files)


def test_a_missing_key_is_refused_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    config = EndpointJudgeConfig(base_url="http://h/v1", model="m", api_key_env="JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY must hold"):
        build_judge(config)


def test_the_cache_survives_a_restart_and_costs_nothing(serve, judge_for, tmp_path):
    endpoint = serve((200, {}, said("no", tokens=(1000, 10))))
    prices = {"price_per_million_input": 2.0, "price_per_million_output": 8.0}
    first = judge_for(endpoint, cache_dir=tmp_path / "cache", **prices)
    before = first.judge([item("rome"), item("paris"), item("rome")])
    stats = first.stats()
    assert (stats.num_calls, stats.num_input_tokens, stats.num_output_tokens) == (2, 2000, 20)
    assert stats.cost == pytest.approx((2000 * 2.0 + 20 * 8.0) / 1e6)
    first.close()
    second = judge_for(endpoint, cache_dir=tmp_path / "cache", **prices)
    assert second.judge([item("rome"), item("paris"), item("rome")]) == before
    assert len(endpoint.requests) == 2
    stats = second.stats()
    assert (stats.num_calls, stats.num_cache_hits, stats.cost) == (0, 2, 0.0)


def test_failures_are_not_cached(serve, judge_for, tmp_path):
    endpoint = serve((200, {}, said("perhaps")), OK)
    judge = judge_for(endpoint, cache_dir=tmp_path, max_retries=0)
    assert isinstance(judge.judge([item()])[0], JudgeFailure)
    assert judge.judge([item()])[0].is_correct


def test_another_model_or_address_does_not_share_a_verdict(serve, judge_for, tmp_path):
    yes, no = serve(OK), serve((200, {}, said("no")))
    assert judge_for(yes, cache_dir=tmp_path).judge([item()])[0].is_correct
    assert not judge_for(no, cache_dir=tmp_path).judge([item()])[0].is_correct
    judge_for(yes, cache_dir=tmp_path, model="other").judge([item()])
    assert len(yes.requests) == 2


def test_a_broken_cache_file_is_asked_again_and_repaired(serve, judge_for, tmp_path):
    endpoint = serve(OK)
    judge_for(endpoint, cache_dir=tmp_path).judge([item()])
    (path,) = tmp_path.rglob("*.json")
    path.write_text("{")
    assert judge_for(endpoint, cache_dir=tmp_path).judge([item()])[0].is_correct
    assert json.loads(path.read_text())["reply"] == "yes"
    assert len(endpoint.requests) == 2


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(serve, judge_for, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file must be a folder that can be written"):
        judge_for(serve(OK), cache_dir=tmp_path / "file").judge([item()])


def test_two_judges_on_one_cache_at_once_agree_and_leave_whole_files(serve, judge_for, tmp_path):
    endpoint = serve(OK)
    judges = [judge_for(endpoint, cache_dir=tmp_path) for _ in range(2)]
    items = [item(f"answer {index}") for index in range(30)]
    outcomes = [None, None]
    threads = [
        threading.Thread(target=lambda i=i: outcomes.__setitem__(i, judges[i].judge(items)))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes[0] == outcomes[1]
    assert len([json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]) == 30
    hits, calls, retries = (
        sum(getattr(judge.stats(), name) for judge in judges)
        for name in ("num_cache_hits", "num_calls", "num_retries")
    )
    assert hits + calls - retries == 60
    assert len(endpoint.requests) == calls


def test_no_more_requests_are_open_than_allowed_over_several_callers(serve, judge_for):
    def slow(body):
        time.sleep(0.05)
        return OK

    endpoint = serve(slow)
    judge = judge_for(endpoint, max_concurrent=3)
    threads = [
        threading.Thread(target=judge.judge, args=([item(f"{caller} {i}") for i in range(4)],))
        for caller in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(endpoint.requests) == 16
    assert 2 <= endpoint.max_open <= 3


def test_requests_keep_the_rate_limit(serve, judge_for):
    endpoint = serve(OK)
    judge_for(endpoint, requests_per_minute=600).judge([item(str(index)) for index in range(6)])
    assert max(endpoint.times) - min(endpoint.times) >= 0.45


def test_closing_ends_a_judge_that_is_waiting(serve, judge_for):
    judge = judge_for(serve((429, {"Retry-After": "200"}, "")), max_retries=5)
    outcomes = []
    waiting = threading.Thread(target=lambda: outcomes.extend(judge.judge([item(), item("b")])))
    waiting.start()
    time.sleep(0.3)
    judge.close()
    waiting.join(timeout=10)
    assert [type(outcome) for outcome in outcomes] == [JudgeFailure] * 2
    assert "closed" in outcomes[0].error
