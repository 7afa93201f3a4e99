"""``past-ray judge calibrate``: what is printed of which files and judges."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from past_ray.cli.judge import judge_app

app = typer.Typer()
app.add_typer(judge_app, name="judge")


def entry(gold, right, wrong, *, is_right=True, is_wrong=False):
    return {
        "question": "where ?",
        "answer": gold,
        "baseline_answer": wrong,
        "baseline_correct": is_wrong,
        "adapter_answer": right,
        "adapter_correct": is_right,
    }


# The default rule gives: oslo yes, rome no; berlin yes, the sea no; and "oslo" a second time.
ENTRIES = [
    entry("oslo", "it is oslo", "rome"),
    entry("berlin", "berlin", "the capital", is_wrong=True),
    entry("oslo", "it is oslo", "rome or oslo"),
]


def write(path, entries):
    path.write_text(json.dumps({"articles": [{"completions": [{"questions": entries}]}]}))
    return path


@pytest.fixture
def graded(tmp_path):
    return write(tmp_path / "graded.json", ENTRIES)


def run(*arguments):
    return CliRunner().invoke(app, ["judge", "calibrate", *map(str, arguments)])


def report_of(*arguments):
    outcome = run(*arguments, "--json")
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


@pytest.fixture
def endpoint():
    """Says yes to everything; counts its calls."""
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            calls.append(self.rfile.read(int(self.headers["Content-Length"])))
            usage = {"prompt_tokens": 100, "completion_tokens": 1}
            body = {"choices": [{"message": {"content": "yes"}}], "usage": usage}
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", calls
    server.shutdown()
    server.server_close()


def test_json_holds_the_counts_of_the_default_rule(graded):
    report = report_of(graded)
    # Distinct: it is oslo (both yes), rome (both no), berlin (both yes), the capital (only the
    # reference), rome or oslo (only the rule).
    assert report["num_answers"] == 5
    assert (report["num_repeats_left_out"], report["num_contradictions_left_out"]) == (1, 0)
    assert (report["num_true_positives"], report["num_true_negatives"]) == (2, 1)
    assert (report["num_false_positives"], report["num_false_negatives"]) == (1, 1)
    assert report["agreement"] == pytest.approx(3 / 5)
    assert report["precision"] == report["recall"] == pytest.approx(2 / 3)
    assert report["kappa"] == pytest.approx((3 / 5 - 13 / 25) / (1 - 13 / 25))
    assert report["judge"]["rule"] == "gold_token_recall"


def test_an_answer_in_two_files_counts_once(graded, tmp_path):
    other = write(tmp_path / "other.json", [ENTRIES[0], entry("oslo", "rome", "x", is_right=True)])
    report = report_of(graded, other)
    # "rome" is now both wrong and correct, and left out; "x" is new.
    assert (report["num_answers"], report["num_contradictions_left_out"]) == (5, 1)


def test_the_sweep_and_the_effect_of_the_cap_are_reported(graded):
    report = report_of(graded, "--set", "judge.kind=rule", "--set", "judge.max_words=2")
    # "it is oslo" and "rome or oslo" no longer reach oslo.
    assert (report["num_true_positives"], report["num_false_positives"]) == (1, 0)
    assert report["all_words"]["num_true_positives"] == 2
    assert report["all_words"]["agreement"] == pytest.approx(3 / 5)
    thresholds = [row["correct_at"] for row in report["sweep"]]
    assert thresholds == sorted(thresholds)
    assert 0.67 in thresholds


def test_the_table_has_the_same_numbers(graded):
    outcome = run(graded)
    assert outcome.exit_code == 0
    assert "rule gold_token_recall >= 0.67, first 48 words" in outcome.stdout
    assert "5 answers; left out: 1 repeats" in outcome.stdout
    rows = [line.split() for line in outcome.stdout.splitlines()]
    assert ["judge", "0.6000", "0.6667", "0.6667", "0.1667"] in rows


def test_an_endpoint_is_calibrated_and_its_cost_shown(graded, tmp_path, endpoint):
    base_url, calls = endpoint
    config = tmp_path / "judge.yaml"
    config.write_text(
        f"judge: {{kind: endpoint, base_url: '{base_url}', model: m, requests_per_minute: 60000,"
        f" cache_dir: '{tmp_path / 'cache'}', price_per_million_input: 100}}"
    )
    report = report_of(graded, "--config", config)
    assert report["recall"] == 1.0
    assert report["precision"] == pytest.approx(3 / 5)
    assert report["stats"]["num_calls"] == len(calls) == 5
    assert report["stats"]["cost"] == pytest.approx(5 * 100 * 100 / 1e6)
    assert report["sweep"] == []
    outcome = run(graded, "--config", config, "--limit", "2")
    assert "0 calls, 0 of them retries; 2 verdicts from the cache" in outcome.stdout
    assert len(calls) == 5


def test_a_judge_that_decides_nothing_is_an_error(graded, tmp_path):
    config = tmp_path / "judge.yaml"
    config.write_text(
        "judge: {kind: endpoint, base_url: 'http://127.0.0.1:9/v1', model: m, max_retries: 0,"
        " requests_per_minute: 60000}"
    )
    outcome = run(graded, "--config", config)
    assert outcome.exit_code == 1
    assert "failed on all 5" in outcome.stderr


def test_bad_input_is_one_message_and_no_traceback(graded, tmp_path):
    for arguments, text in (
        ((tmp_path / "nowhere.json",), "nowhere.json must be a JSON file of graded answers"),
        ((graded, "--set", "judge.kind=oracle"), "must be one of"),
        ((graded, "--set", "judge={kind: rule, correct_at: 2}"), "judge.correct_at"),
    ):
        outcome = run(*arguments)
        assert outcome.exit_code == 1
        assert text in outcome.stderr
        assert "Traceback" not in outcome.output


def test_help_needs_no_framework():
    code = (
        "import sys; from past_ray.cli.judge import judge_app; "
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.skipif("PAST_RAY_DATA" not in os.environ, reason="PAST_RAY_DATA is not set")
def test_the_default_rule_agrees_with_gpt_4_1_on_86_percent_of_the_graded_file():
    report = report_of(Path(os.environ["PAST_RAY_DATA"], "squad", "graded", "base.json"))
    assert report["agreement"] >= 0.86
    assert report["num_answers"] == 1928
    assert report["num_repeats_left_out"] == 20
