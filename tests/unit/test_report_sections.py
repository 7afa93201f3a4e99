"""The sections and the terminal table that only some runs have."""

import functools
import re
from html import unescape

from past_ray.pipelines.demonstration import print_arms
from past_ray.pipelines.report import render_report
from tests.unit.test_report import Balance, full_page, full_report, headings, small_report


def model_figures(**changes):
    return {
        "empty_frac": 0.0,
        "mean_words": 6.0,
        "repetition_frac": 0.02,
        "self_consistency": 0.8,
        "perplexity": 21.25,
    } | changes


def held_out(perplexity, accuracy):
    return {
        "perplexity": perplexity,
        "next_token_accuracy": 0.5,
        "tokens_read": 4100,
        "tokens_scored": 4096,
        "in_context": {"accuracy": accuracy, "ci95": [accuracy - 0.1, accuracy + 0.1]},
    }


def real_text_report(**changes):
    """What a run on real text has besides."""
    arms = full_report()["arms"]
    arms["base"]["judge_failures"], arms["past"]["judge_failures"] = 0, 3
    return (
        full_report()
        | {
            "arms": arms,
            "scale_choice": {
                "scale": 0.75,
                "accuracy": 0.6,
                "best_scale": 1.0,
                "reason": "scale 1 has the best validation accuracy (61.0%)",
            },
            "forgetting": {"before": held_out(20.5, 0.4), "after": held_out(None, 0.3)},
            "diagnostics": {
                "before": model_figures(),
                "after": model_figures(repetition_frac=0.5, self_consistency=None),
                "warnings": [{"sign": "repetition_frac", "message": "repeated <4-grams>"}],
                "num_questions": 40,
                "num_samples": 4,
            },
            "texts_source": {"texts": 31, "empty": 1, "truncated": 7},
            "texts_target": {"texts": 40, "empty": 0, "truncated": 9},
            "paper": {
                "title": "SQuAD",
                "rows": [
                    {
                        "method": "PaST",
                        "ours": "75.0 [70.0, 80.0]",
                        "gain": "+25.0",
                        "mean_words": "4.0",
                        "published": "56.9*",
                        "note": "",
                    }
                ],
                "footnotes": ["* Measured otherwise than ours: the model."],
                "differences": ["the model"],
                "text": "| PaST | 75.0 [70.0, 80.0] |",
            },
        }
        | changes
    )


@functools.cache
def real_text_page():
    return render_report(real_text_report())


def text_of(html):
    """Words of the page after the styles, without tags, white space made one blank."""
    words = re.sub(r"<svg.*?</svg>|<[^>]*>", " ", html[html.index("<body>") :], flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(words))


def test_real_text_has_sections_of_its_own_on_one_well_formed_page():
    html = real_text_page()
    assert headings(html) == [
        "Arms",
        "Beside the paper",
        "How much skill, how much knowledge",
        "Signs of a broken model",
        "What adaptation forgets",
        "Texts the model wrote",
        "Angles between updates",
        "Training",
        "Weight sync",
        "Time",
        "Example answers",
        "Versions and configuration",
    ]
    balance = Balance()
    balance.feed(html)
    assert (balance.wrong, balance.open) == ([], [])


def test_chosen_scale_is_named_with_its_reason():
    page = text_of(real_text_page())
    assert "with a scale of \u03bb = 0.75, chosen on a validation domain" in page
    assert "scale 1 has the best validation accuracy (61.0%)." in page
    assert "never tunes it" not in page
    assert "The method uses \u03bb = 1 and never tunes it on the target." in text_of(full_page())


def test_chosen_scale_is_named_without_a_sweep_too():
    report = small_report(scale_choice=real_text_report()["scale_choice"])
    assert headings(render_report(report)) == ["Arms", "How much skill, how much knowledge"]


def test_forgetting_stands_before_and_after_and_a_missing_perplexity_is_a_dash():
    page = text_of(real_text_page())
    assert "Perplexity 20.50 \u2013 Next token right (%) 50.0 50.0" in page
    assert "passage in prompt (%) 40.0 30.0 to 50.0 30.0 20.0 to 40.0" in page
    assert "Tokens scored 4,096 4,096" in page


def test_diagnostics_show_their_warnings_and_both_models():
    html = real_text_page()
    page = text_of(html)
    assert "Warning: repeated <4-grams>" in page
    assert "repeated &lt;4-grams&gt;" in html
    assert "4 sampled answers to each of 40 target questions" in page
    assert "Repeated 4-grams (%) 2.0 50.0 Agreement of sampled answers (%) 80.0 \u2013" in page
    assert "Perplexity of the target's documents 21.25 21.25" in page


def test_diagnostics_without_warnings_say_so_and_why_there_is_no_perplexity():
    found = real_text_report()["diagnostics"] | {
        "after": model_figures(perplexity=None),
        "before": model_figures(perplexity=None),
        "warnings": [],
        "perplexity_note": "not measured: adapters",
    }
    page = text_of(render_report(small_report(diagnostics=found)))
    assert "None was found. No label of the target was used." in page
    assert "Warning" not in page
    assert "Perplexity: not measured: adapters." in page


def test_arms_that_the_judge_failed_on_are_named_and_no_others():
    page = text_of(real_text_page())
    assert (
        "The judge failed on some answers, which are left out of the accuracy above: PaST 3."
        in (page)
    )
    assert "The judge failed" not in text_of(full_page())


def test_written_texts_are_counted_with_those_that_were_dropped_or_cut_off():
    page = text_of(real_text_page())
    assert "Domain Texts Empty Cut off Source 31 1 7 Target 40 0 9" in page


def test_terminal_shows_the_paper_s_table_as_it_is_where_there_is_one(tmp_path, capsys):
    report = real_text_report()
    for result in report["arms"].values():
        result["seconds_per_new_target"] = 1.0
    line = "| PaST | 75.0 [70.0, 80.0] |" + "-" * 120
    report["paper"]["text"] = line
    print_arms(report, tmp_path)
    assert line in capsys.readouterr().out.splitlines()
    del report["paper"]
    print_arms(report, tmp_path)
    assert "[70.0, 80.0]" not in capsys.readouterr().out
