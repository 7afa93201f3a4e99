"""One judge in an actor, asked from many workers."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from past_ray.config.judge import EndpointJudgeConfig, ModelJudgeConfig
from past_ray.config.runtime import GeneratorConfig
from past_ray.errors import ConfigError, GradingError
from past_ray.runtime.judge_actor import RemoteJudge, start_judge
from past_ray.tasks.judging import JudgeFailure, JudgeGrader, JudgeItem, Verdict
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray


def item(answer="oslo"):
    return JudgeItem(question="where ?", gold="oslo", answer=answer)


@pytest.fixture
def endpoint():
    """Says yes to answers with oslo, after ``delay_s``; gives 500 to those with broken."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.times.append(time.monotonic())
            time.sleep(server.delay_s)
            answer = body["messages"][0]["content"].split("Answer to judge: ")[1]
            word = "yes" if "oslo" in answer else "no"
            data = json.dumps({"choices": [{"message": {"content": word}}]}).encode()
            self.send_response(500 if "broken" in answer else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.times, server.delay_s = [], 0.0
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def config(endpoint, **settings):
    defaults = {
        "base_url": f"http://127.0.0.1:{endpoint.server_port}/v1",
        "model": "m",
        "requests_per_minute": 60_000,
        "max_retries": 0,
    }
    return EndpointJudgeConfig(**(defaults | settings))


def test_workers_share_one_rate_limit_and_one_count(cluster, endpoint):
    judge = start_judge(config(endpoint, requests_per_minute=1200), timeout_s=60, num_cpus=0.1)

    @ray.remote(num_cpus=0.1)
    def ask(judge, name):
        grade = JudgeGrader(judge, "where ?")
        return [grade(f"{name} {word}", "oslo") for word in ("oslo", "rome", "oslo fjord")]

    rewards = ray.get([ask.remote(judge, name) for name in ("a", "b", "c")])
    assert rewards == [[1.0, 0.0, 1.0]] * 3
    assert judge.stats().num_calls == 9
    # Nine requests, 50 ms apart, whoever sends them.
    assert max(endpoint.times) - min(endpoint.times) >= 0.4 - 0.05


def test_a_failure_of_the_judge_excludes_the_rollout(cluster, endpoint):
    judge = start_judge(config(endpoint), timeout_s=60, num_cpus=0.1)
    outcome, verdict = judge.judge([item("broken"), item()])
    assert isinstance(outcome, JudgeFailure)
    assert verdict == Verdict(score=1.0, is_correct=True, explanation="yes")
    with pytest.raises(GradingError, match="status 500"):
        JudgeGrader(judge, "where ?")("broken", "oslo")


def test_a_call_that_takes_too_long_is_a_failure_and_the_actor_still_answers(cluster, endpoint):
    endpoint.delay_s = 5.0
    judge = RemoteJudge(start_judge(config(endpoint), timeout_s=60, num_cpus=0.1).handle, 1.0)
    started = time.monotonic()
    outcomes = judge.judge([item("a"), item("b")])
    assert time.monotonic() - started < 4
    assert [type(outcome) for outcome in outcomes] == [JudgeFailure] * 2
    assert "must answer within 1 s" in outcomes[0].error
    assert judge.stats().num_calls == 2


def test_a_judge_that_dies_gives_failures_and_then_answers_again(cluster, endpoint):
    judge = start_judge(config(endpoint), timeout_s=60, num_cpus=0.1)
    assert judge.judge([item()])[0].is_correct
    ray.kill(judge.handle, no_restart=False)
    deadline = time.monotonic() + 60
    while isinstance(outcome := judge.judge([item()])[0], JudgeFailure):
        assert "actor must answer" in outcome.error
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert outcome.is_correct


def test_a_missing_key_is_refused_at_the_start(cluster, endpoint):
    with pytest.raises(ConfigError, match="NO_SUCH_KEY must hold"):
        start_judge(config(endpoint, api_key_env="NO_SUCH_KEY"), timeout_s=60, num_cpus=0.1)


def test_a_vllm_model_in_the_actor_judges_calls_of_several_workers(cluster, tmp_path):
    folder = make_tiny_model(tmp_path / "tiny")
    generator = GeneratorConfig(max_model_len=256, kv_cache_gib=0.125)
    settings = ModelJudgeConfig(path=folder, max_new_tokens=4, generator=generator)
    judge = start_judge(settings, timeout_s=120, num_cpus=0.5)

    @ray.remote(num_cpus=0.1)
    def ask(judge, items):
        return judge.judge(items)

    items = [item("oslo"), item("rome"), item("")]
    outcomes = ray.get([ask.remote(judge, items) for _ in range(2)])
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][2] == Verdict(score=0.0, is_correct=False, explanation="empty answer")
    assert judge.stats().num_calls == 4
    ray.get(judge.handle.close.remote())
