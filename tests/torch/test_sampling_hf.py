"""The sampler against transformers' own logits processors."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from unillava.inference.options import Options
from unillava.inference.sampling import Sampler, penalise, weigh

CASES = [
    {"temperature": 1.0},
    {"temperature": 0.2},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_p": 0.35},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.9, "top_k": 40},
    {"temperature": 1.1, "top_k": 40, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 5000, "top_p": 0.95, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.8},
]


def theirs(logits, options, prompt):
    """Scores after transformers' processors, in the order in which `generate` builds them."""
    steps = LogitsProcessorList()
    if options.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.temperature != 1:
        steps.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(TopPLogitsWarper(options.top_p))
    return steps(torch.tensor([prompt]), torch.from_numpy(logits)[None])[0]


def ours(logits, options, prompt):
    if options.repetition_penalty != 1:
        logits = penalise(logits, set(prompt), options.repetition_penalty)
    kept, weights = weigh(logits, options, logits.max())
    kept = np.arange(len(logits)) if kept is None else kept
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights / weights.sum()
    return probabilities


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "peaked", "tied"])
def test_same_tokens_kept_with_the_same_probabilities(case, kind):
    random = np.random.default_rng(0)
    options = Options(**case)
    for vocabulary in (7, 1000, 20000):
        logits = random.standard_normal(vocabulary).astype(np.float32)
        logits *= {"normal": 1, "peaked": 6, "tied": 3}[kind]
        if kind == "tied":
            logits = np.round(logits * 2) / 2
        prompt = random.integers(0, vocabulary, 30).tolist()
        scores = theirs(logits, options, prompt)
        expected = torch.softmax(scores, -1).double().numpy()
        found = ours(logits, options, prompt)
        if kind == "tied":
            # torch's sort is not stable: which of several equal tokens stays is its accident.
            expected, found = np.sort(expected), np.sort(found)
        np.testing.assert_array_equal(found > 1e-30, expected > 1e-30)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_equal_logits(top_p):
    logits = np.zeros(4, np.float32)
    scores = theirs(logits, Options(temperature=1.0, top_p=top_p), [0])
    found = ours(logits, Options(temperature=1.0, top_p=top_p), [0])
    np.testing.assert_array_equal(found > 0, torch.isfinite(scores).numpy())


def test_draws_pass_a_chi_square_test():
    random = np.random.default_rng(1)
    logits = (2 * random.standard_normal(60)).astype(np.float32)
    options = Options(temperature=0.9, top_k=25, top_p=0.9, seed=11)
    expected = torch.softmax(theirs(logits, options, [0]).double(), -1).numpy()
    sampler = Sampler(options, [])
    draws = np.bincount([sampler.pick(logits) for _ in range(20000)], minlength=60)
    assert draws[expected == 0].sum() == 0
    kept = expected > 0
    assert chisquare(draws[kept], 20000 * expected[kept]).pvalue > 0.001
