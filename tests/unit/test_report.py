import functools
import json
import math
import re
from html.parser import HTMLParser

import matplotlib as mpl
import pytest

from past_ray.pipelines import plots
from past_ray.pipelines.report import (
    cosine_finding,
    duration,
    render_report,
    verdict,
    write_pictures,
    write_report,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def arm(accuracy, low, high, **further):
    return {
        "accuracy": accuracy,
        "ci95": [low, high],
        "answer_tokens": 1.4,
        "seconds": 125.0,
    } | further


def cells(value, num_layers):
    return [
        {"layer": layer, "module": module, "cosine": value * (layer + 1)}
        for layer in range(num_layers)
        for module in PROJECTIONS
    ]


def small_report(**changes):
    return {
        "name": "tiny",
        "arms": {"target_sft": arm(0.5, 0.45, 0.55), "past": arm(0.75, 0.7, 0.8)},
    } | changes


def full_report():
    steps = [
        {"step": step, "reward": step / 30, "entropy": 1 / step, "ref_kl": 0.01, "grad_norm": 1.0}
        for step in range(1, 31)
    ]
    kinds = {"single": 0.8, "pair": 0.3125}
    return small_report(
        seed=7,
        created="2026-01-02T03:04:05+00:00",
        versions={"torch": "2.13.0"},
        git_commit="0123456789abcdef+",
        num_heldout_questions=240,
        arms={
            "past": arm(0.75, 0.7, 0.8, truncated_frac=0.02, accuracy_by_kind=kinds),
            "base": arm(0.1, 0.05, 0.15, seconds=0.0),
            "target_sft": arm(0.5, 0.45, 0.55, seconds_per_new_target=38.0),
            "target_rl": arm(0.9, 0.85, 0.95),
        },
        scale_sweep=[
            {"scale": scale, "accuracy": 0.5 + scale / 4, "ci95": [0.4, 0.9]}
            for scale in (0.0, 0.5, 1.0)
        ],
        dose_curve=[
            {"sft_steps": 60, "target_sft": 0.6, "past": 0.7},
            {"sft_steps": 240, "target_sft": 0.4, "past": 0.7},
        ],
        cosines={"sft_source__rl_source": -0.01, "sft_source__sft_target": 0.2, "rl__rl": None},
        cosine_modules={
            "sft_source__rl_source": cells(-0.01, 4),
            "sft_source__sft_target": cells(0.05, 4),
        },
        weight_sync={"max_logprob_gap": 3.1e-6, "median_seconds": 0.18, "num_syncs": 48},
        training={"sft": {"sft_target": [2.0, 1.0, 0.5]}, "rl": {"rl_source_1": steps}},
        stage_seconds={"sft_target": 38.0, "rl_source_1": 130.0},
        answers=[{"question": "a <b> ?", "gold": "x & y", "answers": {"past": "x", "base": ""}}],
        config="name: tiny\n",
    )


@functools.cache
def full_page():
    return render_report(full_report())


def seeds_report():
    runs = {"0": (0.5, 0.75), "1": (0.55, 0.7), "2": (0.6, 0.58)}
    return {
        "name": "seeds",
        "arms": {"target_sft": arm(0.55, 0.5, 0.6), "past": arm(0.6767, 0.58, 0.75)},
        "cosines": {"sft_source__rl_source": 0.01},
        "per_seed": {
            seed: {
                "arms": {"target_sft": arm(sft, 0, 1), "past": arm(past, 0, 1)},
                "cosines": {"sft_source__rl_source": 0.01},
            }
            for seed, (sft, past) in runs.items()
        },
    }


class Balance(HTMLParser):
    """Collects tags that are not closed in the order they were opened."""

    VOID = frozenset({"meta", "br", "path", "rect", "circle", "use", "image", "line", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def headings(html):
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_full_report_has_every_section_and_picture():
    html = full_page()
    assert headings(html) == [
        "Arms",
        "How much skill, how much knowledge",
        "Angles between updates",
        "Training",
        "Weight sync",
        "Time",
        "Example answers",
        "Versions and configuration",
    ]
    assert html.count("<figure><svg") == 5
    balance = Balance()
    balance.feed(html)
    assert (balance.wrong, balance.open) == ([], [])


def test_page_asks_no_server_for_anything():
    html = full_page()
    assert re.search(r"https?:|//[a-z]|<script|<link|url\((?!#)|@import", html) is None
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(source.startswith(("data:", "#")) for source in sources)


def test_sections_without_data_are_left_out():
    html = render_report(small_report(scale_sweep=[], dose_curve=[], cosines={}, training={}))
    assert headings(html) == ["Arms"]
    assert "<figure>" not in html


def test_arms_come_in_the_order_of_the_paper_with_their_difference():
    html = full_page()
    table = html[html.index("<table>") : html.index("</table>")]
    names = re.findall(r"<td>(Base model|Target SFT|PaST|RL on the target)<small>", table)
    assert names == ["Base model", "Target SFT", "PaST", "RL on the target"]
    assert re.findall(r'class="n">([+\u2212][0-9.]+)<', table) == ["\u221240.0", "+25.0", "+40.0"]
    assert "70.0 to 80.0" in table


def test_text_of_the_models_is_escaped():
    html = full_page()
    assert "a &lt;b&gt; ?" in html
    assert "x &amp; y" in html
    assert '<i class="note">empty</i>' in html


def test_verdict_is_a_gain_where_the_intervals_are_apart():
    assert verdict(small_report(num_heldout_questions=240)) == (
        "PaST answers 75.0 % of the 240 held-out target questions correctly, 25.0 points more than"
        " target SFT (50.0 %), and the two 95 % intervals do not meet."
    )


@pytest.mark.parametrize(
    ("past", "expected"),
    [
        (arm(0.56, 0.51, 0.61), "6.0 points more .* overlap, so these questions alone do not"),
        (arm(0.48, 0.43, 0.53), "2.0 points fewer .* overlap"),
        (arm(0.30, 0.25, 0.35), "20.0 points fewer .* did harm"),
    ],
)
def test_verdict_claims_no_more_than_the_intervals_allow(past, expected):
    report = small_report(arms={"target_sft": arm(0.5, 0.45, 0.55), "past": past})
    assert re.search(expected, verdict(report))


def test_verdict_over_seeds_counts_the_seeds_that_agree():
    assert "ahead of it for 2 of 3 seeds" in verdict(seeds_report())


def test_verdict_without_past_names_the_arms():
    assert verdict(small_report(arms={"base": arm(0.1, 0, 0.2)})) == "This run compares Base model."


def test_seeds_report_shows_every_seed_and_one_dot_each():
    html = render_report(seeds_report())
    assert "ahead of it for 2 of 3 seeds" in html
    assert html.count("<circle") == 2 * 3
    assert "the range over seeds" in html
    assert "Accuracy of every seed" in html


def test_cosine_finding_compares_with_the_control():
    assert "cosine of \u22120.0100, in size 0.05 times" in cosine_finding(full_report())
    assert cosine_finding(small_report()) is None
    assert cosine_finding(small_report(cosines={"sft_source__rl_source": None})) is None


def test_heat_maps_share_one_symmetric_scale():
    figure = mpl.figure.Figure()
    left, right = cells(-0.01, 3), cells(0.05, 3)
    plots.draw_cosines(figure, {"left": left, "right": right})
    meshes = [axes.collections[0] for axes in figure.axes[:2]]
    assert [mesh.get_clim() for mesh in meshes] == [pytest.approx((-0.15, 0.15))] * 2


def test_heat_map_leaves_out_norms_and_survives_zero_updates():
    norms = [{"layer": 0, "module": "input_layernorm", "cosine": 0.9}]
    outside = [{"layer": None, "module": "embed_tokens", "cosine": 0.9}]
    none = [{"layer": 0, "module": "q_proj", "cosine": None}]
    assert plots.projection_entries([*norms, *outside, *none]) == none
    figure = mpl.figure.Figure()
    plots.draw_cosines(figure, {"only": [*norms, *outside, *none]})
    assert figure.axes[0].collections[0].get_clim() == (-1.0, 1.0)


def test_written_page_and_file_agree_and_hold_no_nan(tmp_path):
    report = full_report()
    report["cosines"]["rl__rl"] = math.nan
    report["training"]["rl"]["rl_source_1"][3]["ref_kl"] = math.nan
    write_report(report, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    assert saved["arms"] == report["arms"]
    assert saved["cosines"]["rl__rl"] is None
    html = (tmp_path / "run" / "report.html").read_text()
    assert html == render_report(saved)
    assert not re.search(r"\bnan\b", html)


def test_pictures_are_png_files_and_cosines_need_data(tmp_path):
    paths = write_pictures(full_report(), tmp_path / "new")
    assert [path.name for path in paths] == ["arms.png", "cosines.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert [path.name for path in write_pictures(seeds_report(), tmp_path)] == ["arms.png"]


def test_thirty_layers_and_nine_stages_can_be_drawn():
    report = full_report()
    report["cosine_modules"] = {"sft_source__rl_source": cells(0.001, 30)}
    report["training"]["sft"] = {f"stage_{number}": [1.0, 0.5] for number in range(9)}
    assert render_report(report).count("<figure><svg") == 5


def test_rendering_is_reproducible_and_leaves_matplotlib_as_it_was():
    before = dict(mpl.rcParams)
    assert render_report(full_report()) == full_page()
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.354, "0.35 s"),
        (42, "42.0 s"),
        (99.96, "1 min 40 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_read_as_people_write_them(seconds, text):
    assert duration(seconds) == text
