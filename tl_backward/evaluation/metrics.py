"""CounterFact's metrics, computed from target scores and generated texts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

from tl_backward.evaluation.scoring import TargetScores

NEW, TRUE = 0, 1
"""The targets' columns in the scores."""
WANTED = {"efficacy": NEW, "paraphrase": NEW, "neighborhood": TRUE}
"""The wanted target of each kind of prompt."""
FAMILIES = ("success", "magnitude", "accuracy")

_WORD = re.compile(r"\w+(?:[-'.,]\w+)*|[^\w\s]")
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def prompt_metrics(kind: str, scores: TargetScores) -> dict[str, float]:
    """Success, magnitude and accuracy, each averaged over prompts of one kind.

    Efficacy and paraphrases want the new target, neighbours the true one:

    - success: ``NLL(other) > NLL(wanted)``; a tie is no success for either;
    - magnitude: ``exp(-NLL(wanted)) - exp(-NLL(other))``;
    - accuracy: every token of the wanted target is the most probable one (teacher-forced).

    Args:
        kind: ``"efficacy"``, ``"paraphrase"`` or ``"neighborhood"``.
        scores: Scores of the new target (first column) and of the true one (second column).

    Returns:
        The three metrics as fractions and differences of probability, keyed
        ``"efficacy_success"`` and so on.
    """
    wanted = WANTED[kind]
    other = TRUE if wanted == NEW else NEW
    nll = scores.nll.double()
    values = (
        (nll[:, other] > nll[:, wanted]).double(),
        nll[:, wanted].neg().exp() - nll[:, other].neg().exp(),
        scores.predicted[:, wanted].double(),
    )
    return {
        f"{kind}_{family}": float(value.mean())
        for family, value in zip(FAMILIES, values, strict=True)
    }


def harmonic_mean(values: Iterable[float]) -> float:
    """The harmonic mean of nonnegative values; 0 if one of them is 0."""
    values = list(values)
    if any(value == 0 for value in values):
        return 0.0
    return len(values) / sum(1 / value for value in values)


def n_gram_entropy(text: str) -> float:
    """``(2/3 H_2 + 4/3 H_3) / 2``, with the entropies of the text's word pairs and triples in bits.

    Words are runs of letters and digits, possibly joined by single hyphens, apostrophes, full stops
    or commas (``don't``, ``3.5``). Every other non-space character is a word of its own. (The
    original uses ``nltk.word_tokenize``, which needs its own data; the main difference is that it
    splits contractions.)
    """
    words = _WORD.findall(text)
    entropies = (
        weight * _entropy(zip(*(words[i:] for i in range(n)), strict=False))
        for n, weight in _WEIGHTS.items()
    )
    return sum(entropies) / len(_WEIGHTS)


def _entropy(values: Iterable[object]) -> float:
    """The entropy of the empirical distribution, in bits."""
    counts = Counter(values)
    shares = [count / counts.total() for count in counts.values()]
    return math.fsum(-share * math.log2(share) for share in shares)
