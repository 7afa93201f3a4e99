import typing

import pytest

from past_ray.tasks.published import METHODS, PAPER_SETUPS, REGIME_TITLES, Regime, published

REGIMES = typing.get_args(Regime)


def gain(regime, arm):
    figure = published(regime)[arm]
    return round(figure.percent - figure.target_sft, 1)


def test_every_regime_has_a_title_and_a_setup():
    assert set(REGIME_TITLES) == set(PAPER_SETUPS) == set(REGIMES)


@pytest.mark.parametrize("regime", REGIMES)
def test_every_published_arm_has_a_name(regime):
    assert published(regime).keys() <= METHODS.keys()


@pytest.mark.parametrize(
    ("regime", "one_round", "two_rounds"),
    [
        ("single_passage", 11.1, 17.2),
        ("cpt_200", 8.3, 8.1),
        ("cpt_2067", 4.0, 5.8),
        ("loogle", 4.9, 8.0),
    ],
)
def test_gains_are_those_the_paper_prints(regime, one_round, two_rounds):
    assert (gain(regime, "past"), gain(regime, "past_two_rounds")) == (one_round, two_rounds)


def test_lead_over_seal_on_single_passages_is_the_one_of_the_abstract():
    figures = published("single_passage")
    assert figures["past_two_rounds"].percent - figures["seal"].percent == pytest.approx(9.9)


def test_places_of_injection_are_compared_within_their_own_table():
    # Table 5 has its own target SFT (32.9), on the first 10 documents.
    assert (gain("loogle", "sequential"), gain("loogle", "pre_injection")) == (-2.6, 3.6)
    assert published("loogle")["sequential"].source == "Table 5"
    assert published("loogle")["past"].source == "Table 2"


def test_seal_on_single_passages_names_the_prompt_that_beats_it():
    assert published("single_passage")["seal"].remark.startswith("prompt 'rewrite'")
    assert published("single_passage")["seal_one_round"].percent == 43.7
    assert published("cpt_200")["seal"].remark == ""
