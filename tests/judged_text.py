"""Text made by hand with planted units, for tests of examples, rules and judges."""

import itertools
from collections.abc import Sequence

import numpy as np

from lorsa_utils.autointerp import examples
from lorsa_utils.autointerp.examples import Budget, Corpus, Examples

LENGTH, FIRST_WORD = 32, 20
BUDGET = Budget(units=20, shown=40, contrast=40, scored=20, least=8)
SPECIAL = {0: "<bos>", 1: ",", **{2 + digit: str(digit) for digit in range(10)}}
WORDS = [f" {''.join(letters)}x" for letters in itertools.product("abcdefghi", repeat=3)][:600]
STRINGS = SPECIAL | dict(enumerate(WORDS, start=FIRST_WORD))
SAID = ("Active on a digit.", 'Active on a token right after ",".', "Active on a token that occurred earlier.")
"""Of the planted units."""


def make_tokens(n: int, words: Sequence[int], digits: Sequence[int], comma: int, bos: int, seed: int = 0) -> np.ndarray:
    """Different words in every sequence; in half of them a comma, in half a digit, in half one word comes again."""
    rng = np.random.default_rng(seed)
    tokens = np.full((n, LENGTH), bos, dtype=np.int64)
    for row in tokens:
        row[1:] = rng.choice(words, LENGTH - 1, replace=False)
        places = rng.permutation(np.arange(4, LENGTH - 1))
        if rng.random() < 0.5:
            row[places[0]] = comma
        if rng.random() < 0.5:
            row[places[1]] = rng.choice(digits)
        if rng.random() < 0.5:
            row[max(places[2:4])] = row[min(places[2:4])]
    return tokens


def make_corpus(n: int = 240, seed: int = 0) -> Corpus:
    """With a mask that leaves the first token out."""
    tokens = make_tokens(n, range(FIRST_WORD, FIRST_WORD + len(WORDS)), range(2, 12), 1, 0, seed)
    mask = np.ones_like(tokens, dtype=bool)
    mask[:, 0] = False
    return Corpus(tokens, mask, STRINGS)


def planted_sets(seed: int = 0, budget: Budget = BUDGET) -> Examples:
    """Units that fire on digits, after a comma, and on a word that came before."""
    corpus = make_corpus(seed=seed)
    digits = (corpus.tokens >= 2) & (corpus.tokens < 12)
    after_comma, again = np.zeros_like(corpus.mask), np.zeros_like(corpus.mask)
    after_comma[:, 1:] = corpus.tokens[:, :-1] == 1
    for row, column in np.ndindex(corpus.tokens.shape):
        again[row, column] = corpus.tokens[row, column] in corpus.tokens[row, :column]
    return examples.examples(examples.planted(corpus, [digits, after_comma, again], [0, 1, 4]), budget, seed)
