import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from past_ray.skill.noise import uniform_bits

N = 2**16
# Hoeffding: a mean of N values in [0, 1] is further than this from its expectation once in 1e9.
MEAN_TOLERANCE = math.sqrt(math.log(2e9) / (2 * N))
WORD = 2**64 - 1


def bits(*, seed=0, name="w", start=0, count=N):
    return uniform_bits(seed=seed, name=name, start=start, count=count)


def bit_shares(values):
    """The share of ones at each of the 32 positions."""
    return torch.stack([(values >> place & 1).double().mean() for place in range(32)])


def philox_block(counter, key):
    """Philox4x64-10 as its paper writes it: ten rounds of two products, the key bumped between."""
    x = [counter, 0, 0, 0]
    k = [key & WORD, key >> 64]
    for _ in range(10):
        p, q = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [q >> 64 ^ x[1] ^ k[0], q & WORD, p >> 64 ^ x[3] ^ k[1], p & WORD]
        k = [k[0] + 0x9E3779B97F4A7C15 & WORD, k[1] + 0xBB67AE8584CAA73B & WORD]
    return x


def test_reference_of_this_file_is_philox():
    # Known-answer vector of the Random123 library for counter 0 and key 0.
    assert philox_block(0, 0) == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B
    ]  # fmt: skip


def test_every_element_is_the_half_word_that_the_documented_mapping_names():
    key = int.from_bytes(hashlib.blake2b(b"7/a.w", digest_size=16).digest(), "little")
    expected = []
    for i in range(50):
        word = philox_block(i // 8 + 1, key)[i % 8 // 2]
        expected.append(word >> 32 if i % 2 else word & 0xFFFFFFFF)
    assert bits(seed=7, name="a.w", count=50).tolist() == expected


def test_high_elements_of_a_large_tensor_have_bits_of_their_own():
    start = 2**40 + 5
    key = int.from_bytes(hashlib.blake2b(b"0/w", digest_size=16).digest(), "little")
    # (2**40 + 5) % 8 = 5: the high half of word 2.
    assert bits(start=start, count=1).item() == philox_block(2**37 + 1, key)[2] >> 32


@given(cuts=st.lists(st.integers(0, 200), max_size=6))
def test_chunks_get_the_bits_of_the_whole(cuts):
    edges = sorted({0, 200, *cuts})
    chunks = [bits(start=first, count=last - first) for first, last in pairwise(edges)]
    assert torch.equal(torch.cat(chunks), bits(count=200))


def test_no_elements_need_no_bits():
    assert bits(start=3, count=0).tolist() == []


def test_threads_do_not_disturb_each_other():
    whole = bits(count=64 * 1000)
    with ThreadPoolExecutor(4) as pool:
        chunks = pool.map(lambda i: bits(start=1000 * i, count=1000), range(64))
    assert torch.equal(torch.cat(list(chunks)), whole)


def test_every_bit_is_one_half_of_the_time():
    values = bits()
    assert values.dtype == torch.int64
    assert values.min() >= 0
    assert values.max() < 2**32
    assert (bit_shares(values) - 0.5).abs().max() < MEAN_TOLERANCE


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"seed": -1}, {"name": "v"}, {"name": "w2"}, {"start": 1}]
)
def test_other_seeds_names_and_elements_are_independent(other):
    # The exclusive or of independent bits is uniform, that of equal or opposite bits is constant.
    assert (bit_shares(bits() ^ bits(**other)) - 0.5).abs().max() < MEAN_TOLERANCE


def test_seed_and_name_are_not_run_together():
    assert not torch.equal(bits(seed=1, name="23", count=8), bits(seed=12, name="3", count=8))
