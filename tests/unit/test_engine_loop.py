import threading

import pytest

from past_ray.engine.engine_loop import EngineLoop
from past_ray.errors import ClusterError, GenerationError
from past_ray.rl.types import Completion, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=3)
REFUSED = 666
POISON = 13


class CountingEngine:
    """Ends every request after ``max_new_tokens`` steps; token ``k`` is the k-th step's batch size.

    ``gate`` holds steps back, so that a test decides what is queued while a request is in flight.
    """

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.has_started = threading.Event()
        self.requests = {}
        self.prompts = []
        self.version = 0
        self.is_shut_down = False

    def admit(self, request_id, prompt, sampling):
        if prompt == [REFUSED]:
            raise ValueError("unknown token")
        self.prompts.append(prompt)
        self.requests[request_id] = (prompt, [], sampling.max_new_tokens)
        self.has_started.set()

    def abort(self, request_ids):
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def step(self):
        assert self.gate.wait(10)
        if any(prompt == [POISON] for prompt, _, _ in self.requests.values()):
            raise RuntimeError("out of memory")
        for _, tokens, _ in self.requests.values():
            tokens.append(len(self.requests))
        ended = [key for key, (_, tokens, limit) in self.requests.items() if len(tokens) == limit]
        return [(key, self._taken(key, "length")) for key in ended]

    def take_out(self, request_id):
        return self._taken(request_id, "abort")

    def _taken(self, request_id, reason):
        tokens = self.requests.pop(request_id)[1]
        return Completion(
            token_ids=tokens,
            logprobs=[-1.0] * len(tokens),
            finish_reason=reason,
            policy_version=self.version,
        )

    def shutdown(self):
        self.is_shut_down = True


@pytest.fixture
def engine():
    return CountingEngine()


@pytest.fixture
def loop(engine):
    loop = EngineLoop(lambda: engine)
    yield loop
    engine.gate.set()
    loop.close()


def in_thread(function, *args):
    """Start ``function``; the returned function waits for its result or exception."""
    outcome = {}

    def run():
        try:
            outcome["value"] = function(*args)
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join(10)
        assert not thread.is_alive()
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]

    return result


def wait_until_queued(loop, num_items):
    for _ in range(1000):
        with loop._wakeup:
            if len(loop._queue) == num_items:
                return
        threading.Event().wait(0.005)
    raise AssertionError("nothing was queued")


def test_completions_come_in_the_order_of_their_prompts(loop):
    sampling = [SamplingParams(temperature=0.0, max_new_tokens=length) for length in (3, 1, 2)]
    completions = loop.complete([[1], [2], [3]], sampling)
    assert [completion.token_ids for completion in completions] == [[3, 2, 1], [3], [3, 2]]


def test_requests_of_two_threads_are_decoded_together(loop, engine):
    engine.gate.clear()
    first = in_thread(loop.complete, [[1]], [GREEDY])
    assert engine.has_started.wait(10)
    second = in_thread(loop.complete, [[2]], [GREEDY])
    wait_until_queued(loop, 1)
    engine.gate.set()
    assert first()[0].token_ids == [1, 2, 2]
    assert second()[0].token_ids == [2, 2, 1]


def test_a_command_waits_for_requests_in_flight_and_later_requests_wait_for_it(loop, engine):
    events = []
    engine.gate.clear()
    first = in_thread(loop.complete, [[1]], [GREEDY])
    assert engine.has_started.wait(10)
    command = in_thread(loop.run, lambda: events.append(dict(engine.requests)))
    wait_until_queued(loop, 1)
    second = in_thread(loop.complete, [[2]], [GREEDY])
    wait_until_queued(loop, 2)
    assert events == []
    engine.gate.set()
    command()
    assert events == [{}]
    # Neither ever shared a step with the other.
    assert first()[0].token_ids == second()[0].token_ids == [1, 1, 1]


def test_a_refused_prompt_fails_its_own_call_only_and_leaves_nothing_behind(loop, engine):
    with pytest.raises(GenerationError, match="prompt 1 of 2 was refused: unknown token"):
        loop.complete([[1], [REFUSED]], [GREEDY, GREEDY])
    assert engine.requests == {}
    assert loop.complete([[1]], [GREEDY])[0].token_ids == [1, 1, 1]


def test_an_engine_that_fails_wakes_everybody_and_refuses_what_comes_later(loop, engine):
    engine.gate.clear()
    first = in_thread(loop.complete, [[POISON]], [GREEDY])
    assert engine.has_started.wait(10)
    queued = in_thread(loop.run, lambda: None)
    wait_until_queued(loop, 1)
    engine.gate.set()
    for result in (first, queued):
        with pytest.raises(ClusterError, match="out of memory"):
            result()
    with pytest.raises(ClusterError, match=r"failed before.*out of memory"):
        loop.complete([[1]], [GREEDY])


def test_a_cluster_error_of_a_command_leaves_the_engine_in_use_and_any_other_does_not(loop):
    def refuse():
        raise ClusterError("a name is missing")

    def break_down():
        raise ValueError("shape mismatch")

    with pytest.raises(ClusterError, match="a name is missing"):
        loop.run(refuse)
    assert loop.complete([[1]], [GREEDY])
    with pytest.raises(ClusterError, match="shape mismatch"):
        loop.run(break_down)
    with pytest.raises(ClusterError, match="failed"):
        loop.complete([[1]], [GREEDY])


def test_an_engine_that_does_not_start_raises_where_it_was_asked_for():
    def start():
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        EngineLoop(start)


def test_close_finishes_what_is_in_flight_and_frees_the_engine(loop, engine):
    engine.gate.clear()
    result = in_thread(loop.complete, [[1]], [GREEDY])
    assert engine.has_started.wait(10)
    engine.gate.set()
    loop.close()
    assert result()[0].token_ids == [1, 1, 1]
    assert engine.is_shut_down
    with pytest.raises(ClusterError, match="close"):
        loop.complete([[1]], [GREEDY])


def test_a_resuming_command_runs_at_once_and_the_rest_is_sampled_after_it(loop, engine):
    engine.gate.clear()
    first = in_thread(loop.complete, [[1], [2]], [GREEDY, GREEDY])
    assert engine.has_started.wait(10)
    seen = []

    def swap():
        seen.append(dict(engine.requests))
        engine.version = 1

    command = in_thread(lambda: loop.run(swap, in_flight="resume"))
    wait_until_queued(loop, 1)
    engine.gate.set()
    command()
    assert seen == [{}]
    for completion, start in zip(first(), ([1], [2]), strict=True):
        kept = completion.token_versions.count(0)
        assert completion.token_versions == [0] * kept + [1] * (3 - kept)
        assert 1 <= kept <= 2
        # The kept tokens were part of the prompt when it went on.
        assert engine.prompts[-2:][start[0] - 1] == [*start, *completion.token_ids[:kept]]
        assert len(completion.token_ids) == 3


def test_a_keeping_command_runs_between_two_steps_of_requests_that_stay(loop, engine):
    engine.gate.clear()
    first = in_thread(loop.complete, [[1]], [GREEDY])
    assert engine.has_started.wait(10)
    seen = []
    command = in_thread(
        lambda: loop.run(lambda: seen.append(len(engine.requests)), in_flight="keep")
    )
    wait_until_queued(loop, 1)
    engine.gate.set()
    command()
    assert seen == [1]
    assert first()[0].token_ids == [1, 1, 1]


def test_the_clock_runs_while_requests_are_in_flight_and_not_otherwise(loop, engine):
    assert (loop.clock.seconds, loop.clock.num_open, loop.num_finished) == (0, 0, 0)
    engine.gate.clear()
    first = in_thread(loop.complete, [[1], [2]], [GREEDY, GREEDY])
    assert engine.has_started.wait(10)
    threading.Event().wait(0.1)
    assert loop.clock.num_open == 2
    assert loop.clock.seconds >= 0.09
    engine.gate.set()
    first()
    stopped = loop.clock.seconds
    threading.Event().wait(0.05)
    assert (loop.clock.seconds, loop.clock.num_open, loop.num_finished) == (stopped, 0, 2)
