"""A corpus weighed so that it looks like what a donor vocabulary was trained on.

A donor's shares say how often its tokens occur in the text it comes from; a corpus at hand is of another mix.
All functions work on the corpus as the donor would cut it: which passages, and then which words, must weigh
more for the tokens to be as frequent as the donor says; and which of its tokens are words.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse
from tokenizers import Tokenizer, models

# Chosen on parts of a training text kept back from learning (general web text, books).
_EM_STEPS = 5
_TEMPER = 0.5
_RAKING_STEPS = 8
_RAKING_RATE = 0.3
_LARGEST_FACTOR = 4.0
_DOUBT = 3.0  # occurrences that a token's share of whole words is believed to rest on before any is seen
_UNKNOWN = "<unk>"
_BATCH = 20_000


def cut(words: Sequence[str], shares: Mapping[str, float]) -> sparse.csr_matrix:
    """Cut words into donor tokens by the likeliest path (Viterbi, Unigram model of `shares`).

    Returns counts, `[len(words), len(shares)]` float64; a word that the donor cannot spell has an empty row.
    """
    pieces = [(_UNKNOWN, -100.0), *((token, math.log(share)) for token, share in shares.items())]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    columns: list[int] = []
    ends = [0]
    for start in range(0, len(words), _BATCH):
        for encoding in tokenizer.encode_batch_fast(list(words[start : start + _BATCH])):
            if 0 not in encoding.ids:
                columns += encoding.ids
            ends.append(len(columns))
    shape = (len(words), len(shares))
    return sparse.csr_matrix((np.ones(len(columns)), np.array(columns, dtype=np.int64) - 1, ends), shape)


def passage_factors(counts: sparse.csr_matrix, cuts: sparse.csr_matrix, shares: np.ndarray) -> np.ndarray:
    """Return a factor for each passage, by which its words should weigh more or less.

    A few steps of expectation maximisation towards the mixture of passages that makes the donor's shares
    likeliest. They start from the passages' own sizes and are cut short and damped (square root), for the end
    of that road is a handful of passages.

    Args:
        counts: words in each passage, `[passages, words]`.
        cuts: donor tokens in each word, `[words, tokens]`, as `cut` gives them.
        shares: the donor's shares, `[tokens]`.
    """
    tokens = (counts @ cuts).tocsr()
    sizes = np.asarray(tokens.sum(axis=1)).ravel()
    likely = sparse.diags(1 / np.maximum(sizes, 1)) @ tokens
    start = sizes / max(sizes.sum(), 1)
    wanted = shares / shares.sum()
    mixture = start.copy()
    for _ in range(_EM_STEPS):
        found = likely.T @ mixture
        mixture *= likely @ np.divide(wanted, found, out=np.zeros_like(found), where=found > 0)
        mixture /= max(mixture.sum(), 1e-300)
    return np.divide(mixture, start, out=np.ones_like(start), where=start > 0) ** _TEMPER


def rake(weights: np.ndarray, cuts: sparse.csr_matrix, shares: np.ndarray) -> np.ndarray:
    """Weigh words so that the donor's tokens in them come near the donor's shares (iterative raking).

    Each token gets a factor, a word the product of its tokens' factors, between 1/4 and 4. Words that the
    donor cannot spell keep their weight.

    Args:
        weights: `[words]`; the result has the same sum.
        cuts: donor tokens in each word, `[words, tokens]`, as `cut` gives them.
        shares: the donor's shares, `[tokens]`.
    """
    wanted = np.log(shares / shares.sum())
    factors = np.zeros(len(shares))
    bound = math.log(_LARGEST_FACTOR)

    def raked() -> np.ndarray:
        return weights * np.exp(np.clip(cuts @ factors, -bound, bound))

    for _ in range(_RAKING_STEPS):
        found = cuts.T @ raked()
        used = found > 0
        factors[used] += _RAKING_RATE * (wanted[used] - np.log(found[used] / found.sum()))
    result = raked()
    return np.asarray(result * (weights.sum() / result.sum()))


def whole_words(weights: np.ndarray, cuts: sparse.csr_matrix) -> np.ndarray:
    """Return a factor (0 to 1) for each donor token by which it is a word of its own, `[tokens]`.

    The donor's share of " при" counts all words that begin so, of which few are the word itself; as a word it
    would take the place of real ones. The factor is the square root of the share of a token's occurrences in
    which it is a whole word: the share alone would starve stems and endings. Tokens that the corpus hardly
    holds are near the share of all tokens.

    Args:
        weights: weights of the words, `[words]`.
        cuts: donor tokens in each word, `[words, tokens]`, as `cut` gives them.
    """
    alone = np.asarray(cuts.sum(axis=1)).ravel() == 1
    found, whole = cuts.T @ weights, cuts.T @ (weights * alone)
    usual = (whole.sum() + 1) / (found.sum() + 1)
    return np.asarray((whole + _DOUBT * usual) / (found + _DOUBT)) ** _TEMPER
