"""The next token from the logits, in NumPy: the same choice whatever backend computed them.

Semantics are those of transformers' processors in its order: repetition penalty, temperature,
top-k, top-p. Each request draws from a random stream of its own, one number per token, so a
reply does not depend on what else is in the batch.

Shape letters: V vocabulary, N tokens that may still be drawn.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from unillava.errors import RequestError
from unillava.inference.options import Options

STEPS = 64
"""Steps per unit of score by which top-p narrows down what it sorts."""


class Sampler:
    """Chooses the tokens of one reply."""

    def __init__(self, options: Options, prompt_ids: Iterable[int]) -> None:
        """`prompt_ids`: the tokens of the prompt, which the repetition penalty counts as seen.

        Ids outside the vocabulary of the logits (placeholders) are ignored.
        """
        self.options = options
        self._random = np.random.Generator(np.random.Philox(options.seed))
        self._seen = {int(token) for token in prompt_ids}

    def pick(self, logits_V: np.ndarray) -> int:
        """The next token from float32 logits [V], which are not changed.

        Raises:
            RequestError: the logits hold NaN (or nothing but -inf).
        """
        options = self.options
        if options.repetition_penalty != 1:
            logits_V = penalise(logits_V, self._seen, options.repetition_penalty)
        best = int(np.argmax(logits_V))  # the lowest id among equals; NaN wins
        top = logits_V[best]
        if not np.isfinite(top):
            raise not_finite(top)
        token = best if options.temperature == 0 else self._draw(logits_V, top)
        self._seen.add(token)
        return token

    def _draw(self, logits_V: np.ndarray, top: np.floating) -> int:
        kept_N, weights_N = weigh(logits_V, self.options, top)
        cumulative_N = np.cumsum(weights_N)
        # Tokens in the order of their ids: small differences between backends hardly move it.
        point = self._random.random() * cumulative_N[-1]
        place = int(np.searchsorted(cumulative_N, point, side="right"))
        return place if kept_N is None else int(kept_N[place])


def not_finite(top: np.ndarray | np.floating) -> RequestError:
    """The error of logits whose largest is `top`."""
    return RequestError(
        "the model's logits are not finite numbers",
        given=f"largest logit {top}",
        fix="run in float32 or bfloat16 (--dtype); if that does not help, the weights are damaged",
    )


def penalise(logits_V: np.ndarray, seen: set[int], penalty: float) -> np.ndarray:
    """A copy of the logits in which each token of `seen` is less likely (arXiv 1909.05858)."""
    ids = np.fromiter(seen, np.int64, len(seen))
    ids = ids[(ids >= 0) & (ids < len(logits_V))]
    logits_V = logits_V.copy()
    values = logits_V[ids]
    logits_V[ids] = np.where(values < 0, values * penalty, values / penalty)
    return logits_V


def weigh(
    logits_V: np.ndarray, options: Options, top: np.floating
) -> tuple[np.ndarray | None, np.ndarray]:
    """What a token is drawn from: kept ids [N], rising, and their weights [N] float64.

    Probabilities are the weights divided by their sum. Ids None means all V. `logits_V` are
    float32 after the repetition penalty, `top` their maximum; the temperature is above 0.
    """
    temperature = max(np.float32(options.temperature), np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        # Relative to the maximum, so that a tiny temperature gives -inf and never NaN.
        scores_N = (logits_V - top) / temperature
    kept_N = None
    if 0 < options.top_k < len(scores_N):
        kept_N = _top_k(scores_N, options.top_k)
        scores_N = scores_N[kept_N]
    # Exponentials in float32 are as exact as the logits; their sums must not depend on V.
    weights_N = np.exp(scores_N).astype(np.float64)
    if options.top_p < 1:
        inner = _top_p(scores_N, weights_N, options.top_p)
        kept_N = inner if kept_N is None else kept_N[inner]
        weights_N = weights_N[inner]
    return kept_N, weights_N


def _top_k(scores_V: np.ndarray, k: int) -> np.ndarray:
    """Places of the k largest scores and of all that equal the k-th, rising."""
    least = np.partition(scores_V, -k)[-k]
    return np.flatnonzero(scores_V >= least)


def _top_p(scores_N: np.ndarray, weights_N: np.ndarray, top_p: float) -> np.ndarray:
    """Places, rising, of the fewest largest weights that make up `top_p` of their sum or more.

    That is: those before which, in falling order, less than `top_p` has been collected. The
    first is always kept; of equal ones the higher id comes first, as in a stable rising sort.
    """
    if 1 - top_p == 1:
        return np.array([len(scores_N) - 1 - np.argmax(scores_N[::-1])])
    target = top_p * weights_N.sum()
    # N weights up to this bound cannot exceed the share that is left out: all of them go.
    places = np.flatnonzero(weights_N > (1 - top_p) * weights_N.sum() / len(weights_N))
    # Steps of score from the best down (0, 1, ...) show where the limit falls. Every token
    # above that step stays, and only the tokens of that one step have to be sorted.
    steps = (scores_N[places] * -STEPS).astype(np.int64)
    collected = np.cumsum(np.bincount(steps, weights_N[places]))
    edge = min(int(np.searchsorted(collected, target)), len(collected) - 1)
    above = collected[edge - 1] if edge else 0.0
    doubtful = places[steps == edge]
    doubtful = doubtful[np.argsort(scores_N[doubtful], kind="stable")[::-1]]
    before = above + np.cumsum(weights_N[doubtful]) - weights_N[doubtful]
    count = max(1, int(np.searchsorted(before, target)))
    return np.sort(np.concatenate([places[steps < edge], doubtful[:count]]))
