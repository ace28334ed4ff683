"""The sampler against its definition written out plainly (full sorts, loops)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unillava.errors import RequestError
from unillava.inference.options import Options
from unillava.inference.sampling import Sampler, penalise, weigh


def plain_probabilities(logits, temperature, top_k, top_p):
    """Token -> probability, by the definition: sort everything, walk, renormalise."""
    scores = [float(x) / temperature for x in logits]
    order = sorted(range(len(scores)), key=lambda n: (scores[n], n), reverse=True)
    if top_k:
        least = scores[order[min(top_k, len(order)) - 1]]
        order = [n for n in order if scores[n] >= least]
    weights = np.exp(np.array([scores[n] for n in order]) - scores[order[0]])
    weights /= weights.sum()
    if top_p < 1:
        before, kept = 0.0, 0
        while kept < len(order) and (kept == 0 or before < top_p):
            before, kept = before + weights[kept], kept + 1
        order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
    return {n: w for n, w in zip(order, weights, strict=True) if w > 0}


def probabilities(logits, options):
    kept, weights = weigh(logits, options, logits.max())
    kept = np.arange(len(logits)) if kept is None else kept
    assert (np.diff(kept) > 0).all()
    return {int(n): w / weights.sum() for n, w in zip(kept, weights, strict=True) if w > 0}


LOGITS = st.lists(
    # Multiples of a power of two, so that ties are common and sums of weights rarely are.
    st.integers(-80, 80).map(lambda n: n / 8),
    min_size=1,
    max_size=60,
).map(lambda values: np.array(values, np.float32))


@settings(max_examples=400, deadline=None)
@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, 70),
    # Irrational shares: a sum of a few exponentials does not hit them by accident.
    top_p=st.sampled_from([1.0, 0.0, 2**-0.5, 3**-0.5, 0.1 * 2**0.5, 0.7 * 2**0.5]),
)
def test_kept_tokens_and_probabilities(logits, temperature, top_k, top_p):
    options = Options(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = plain_probabilities(logits, temperature, top_k, top_p)
    found = probabilities(logits, options)
    assert found.keys() == expected.keys()
    for token, share in expected.items():
        assert found[token] == pytest.approx(share, rel=2e-6)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999, 1e-20])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0])
def test_large_vocabulary(top_p, scale):
    logits = (np.random.default_rng(3).standard_normal(50000) * scale).astype(np.float32)
    found = probabilities(logits, Options(temperature=0.7, top_p=top_p))
    # In float64 throughout, sorted as a whole.
    scores = logits.astype(np.float64) / 0.7
    order = np.lexsort((np.arange(len(scores)), scores))[::-1]
    shares = np.exp(scores[order] - scores.max())
    shares /= shares.sum()
    before = np.cumsum(shares) - shares
    count = max(1, int((before < top_p).sum()))
    # A share that equals the limit within rounding may fall on either side.
    assert abs(len(found) - count) <= (np.abs(before - top_p) < 1e-6).sum()
    common = min(len(found), count)
    assert set(order[:common].tolist()) <= set(found) or len(found) < count


def test_greedy_takes_the_lowest_id_among_equals():
    assert Sampler(Options(), []).pick(np.array([1, 5, 5, 2], np.float32)) == 1


def test_repetition_penalty_counts_prompt_and_reply():
    sampler = Sampler(Options(repetition_penalty=2.0), [0, 7, -200])
    logits = np.array([9, 5, 4, -1], np.float32)
    # 0 is in the prompt: 9 / 2 = 4.5. Then 1 has been said: 2.5. Then 0 stays at 4.5.
    assert [sampler.pick(logits) for _ in range(3)] == [1, 0, 0]
    assert logits.tolist() == [9, 5, 4, -1]
    assert penalise(logits, {0, 3}, 2.0).tolist() == [4.5, 5, 4, -2]


def test_reply_depends_on_the_seed_only():
    logits = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32)

    def reply(seed):
        sampler = Sampler(Options(temperature=1.0, seed=seed), [])
        return [sampler.pick(row) for row in logits]

    assert reply(1) == reply(1)
    assert reply(1) != reply(2)


def test_a_small_difference_of_logits_changes_nothing():
    """What another backend computes differs in the last digits; the reply must not."""
    random = np.random.default_rng(5)
    logits = (3 * random.standard_normal((200, 1000))).astype(np.float32)
    noisy = logits + (1e-6 * random.standard_normal(logits.shape)).astype(np.float32)
    options = Options(temperature=0.8, top_p=0.95)
    one, two = Sampler(options, []), Sampler(options, [])
    assert [one.pick(row) for row in logits] == [two.pick(row) for row in noisy]


def test_frequencies_follow_the_distribution():
    logits = np.log(np.array([4, 1, 0, 3, 2], np.float32) + 1e-30)
    sampler = Sampler(Options(temperature=1.0), [])
    draws = np.bincount([sampler.pick(logits) for _ in range(20000)], minlength=5)
    assert draws[2] == 0
    np.testing.assert_allclose(draws / 20000, np.array([4, 1, 0, 3, 2]) / 10, atol=0.015)


def test_forbidden_tokens_and_tiny_temperature():
    logits = np.array([-np.inf, 1.0, 3.0, -np.inf], np.float32)
    for temperature in (1e-40, 1e-6, 0.01):
        sampler = Sampler(Options(temperature=temperature), [])
        assert {sampler.pick(logits) for _ in range(20)} == {2}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad, temperature):
    with pytest.raises(RequestError, match="not finite"):
        Sampler(Options(temperature=temperature), []).pick(np.array([1, bad, 2], np.float32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.01},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": True},
        {"stop": ("",)},
        {"stop": (3,)},
    ],
)
def test_wrong_options_name_the_field(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Options(**wrong)


def test_replace():
    options = Options(temperature=0.5).replace(top_k=3, seed=None, stop="###")
    assert options == Options(temperature=0.5, top_k=3, stop=("###",))
    with pytest.raises(RequestError, match="did you mean temperature"):
        Options().replace(temprature=1.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Options()),
        ({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}, Options()),
        ({"do_sample": True, "top_p": 0.6}, Options(temperature=1.0, top_p=0.6)),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05},
            Options(temperature=0.7, top_k=20, repetition_penalty=1.05),
        ),
    ],
)
def test_generation_config(config, expected):
    assert Options.from_generation_config(config) == expected
