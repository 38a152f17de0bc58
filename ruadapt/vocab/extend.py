"""Extending a BPE vocabulary with real merges (METHOD, sec. 2: Extended).

How new merges continue the old ones: the Cyrillic words are cut with the old merges; each old id becomes one
private character; the native BPE trainer then learns merges of those characters from the word counts; the
learned merges are spelled back and appended. Old merges come first in rank, so a text that holds nothing
Cyrillic keeps its exact ids.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

from ruadapt.errors import RuadaptError
from ruadapt.vocab.spec import Spec, build, learn_bpe, load_tokenizer, read_spec, rows, special_ids
from ruadapt.vocab.surface import fallback_tokens
from ruadapt.vocab.words import learnable_words

Merge = tuple[str, str]
_PRIVATE = 0x10000  # one character for each old token: the planes above the first have room for a million
_BATCH = 20_000
_SAMPLE = 1000  # merges that tell the family


def extend(
    original_folder: Path | str,
    texts: Iterable[str],
    added_rows: int,
    *,
    donor: Path | str | None = None,
    exact: bool = True,
) -> Tokenizer:
    """Append exactly `added_rows` tokens and the merges that reach them behind the old vocabulary.

    Every old id stays, special tokens included; the old merges stay an exact prefix; new tokens are in the
    model's vocabulary, never added tokens; each of them is what the merges make of its own surface. They are
    Cyrillic letters of one word with at most a space before them: no digits, no marks, no second word.

    The first new id is the tokenizer's number of rows, special tokens included. A checkpoint whose matrix is
    padded beyond that (Qwen2.5: ids end at 151,664, the matrix at 151,935) has its padding rows used first.

    Args:
        original_folder: folder with the original's tokenizer.json (byte-level or SentencePiece BPE).
        texts: corpus, read once as a stream; only its Cyrillic words are learned from. May be empty where
            there is a donor.
        added_rows: exact number of new rows.
        donor: another vocabulary of the language to learn from: see `words.read_donor`.
        exact: refuse where fewer rows are possible, instead of adding those.

    Raises:
        RuadaptError: not a BPE model; no Cyrillic word; fewer rows possible than asked for.
    """
    original = load_tokenizer(original_folder)
    return append_rows(original, learnable_words(original, texts, donor), added_rows, exact)


def reachable(tokenizer: Tokenizer, tokens: Iterable[str]) -> dict[str, bool]:
    """Tell for each token whether the merges alone make exactly that token of its own surface.

    Tokens are in the model's spelling. A vocabulary with `ignore_merges` is judged without that short cut.
    """
    wanted, model = list(tokens), tokenizer.model
    short_cut, model.ignore_merges = model.ignore_merges, False
    encodings = Tokenizer(model).encode_batch(wanted, add_special_tokens=False)
    model.ignore_merges = short_cut
    return {token: encoding.tokens == [token] for token, encoding in zip(wanted, encodings, strict=True)}


def require_merges(spec: Spec) -> None:
    """Refuse a Unigram vocabulary, which has no merges."""
    if (kind := spec["model"]["type"]) != "BPE":
        raise RuadaptError(f"a {kind} vocabulary has no merges to extend or prune: `replace` it instead")


def append_rows(
    tokenizer: Tokenizer, words: Mapping[str, int], added_rows: int, exact: bool = True
) -> Tokenizer:
    """Append rows learned from the counts of words in the model's spelling; see `extend`."""
    spec = read_spec(tokenizer)
    require_merges(spec)
    if added_rows < 1:
        raise RuadaptError(f"added_rows is {added_rows}; ask for at least one")
    names, symbols = _as_symbols(tokenizer, words)
    specials, start = special_ids(tokenizer), rows(tokenizer)
    # Special tokens enter the model's vocabulary at their own ids: else the library would renumber them
    # behind the grown vocabulary.
    known = {**spec["model"]["vocab"], **specials}
    old_merges = [(left, right) for left, right in spec["model"]["merges"]]
    every_split = _lists_every_split(old_merges, known.keys())
    alphabet = len(set().union(*map(set, symbols)))
    banned: set[str] = set()
    requested = added_rows + added_rows // 50 + 64
    learned = learn_bpe(symbols, alphabet + requested)["merges"]
    while True:
        fresh, merges = _select(learned, names, known.keys(), set(old_merges), added_rows, banned)
        if len(fresh) < added_rows and len(learned) == requested:
            requested *= 2
            learned = learn_bpe(symbols, alphabet + requested)["merges"]
            continue
        if len(fresh) < added_rows and exact:
            raise RuadaptError(
                f"added_rows {added_rows}: only {len(fresh)} rows are possible with these words; "
                "ask for fewer or give more text"
            )
        if every_split:
            new, parts = set(fresh), known.keys() | set(fresh)
            made = ((pair, "".join(pair)) for pair in merges)
            every = ([pair, *(_splits(token, parts) if token in new else [])] for pair, token in made)
            merges = list(dict.fromkeys(chain.from_iterable(every)))
        numbered = known | {token: start + number for number, token in enumerate(fresh)}
        joined = [*spec["model"]["merges"], *map(list, merges)]
        result = build({**spec, "model": {**spec["model"], "vocab": numbered, "merges": joined}})
        # A learned merge whose result is an old token joins two symbols that the trainer kept apart, and so
        # can pre-empt a later merge. Tokens that lose their path are dropped, others take their rows.
        lost = {token for token, found in reachable(result, fresh).items() if not found}
        if not lost:
            return result
        banned |= lost


def _as_symbols(tokenizer: Tokenizer, words: Mapping[str, int]) -> tuple[dict[str, str], Counter[str]]:
    """Cut words with a model and spell its tokens as private characters.

    Returns {private character: token} and the counts of words of two tokens or more, none of them a byte or
    unknown.
    """
    never = {*fallback_tokens(tokenizer).values(), tokenizer.token_to_id(tokenizer.model.unk_token or "")}
    private: dict[int, str] = {}
    result: Counter[str] = Counter()
    model = Tokenizer(tokenizer.model)  # without normaliser, pre-tokenizer and added tokens
    for ids, count in zip(cuts(model, list(words)), words.values(), strict=True):
        if len(ids) > 1 and never.isdisjoint(ids):
            for number in ids:
                private.setdefault(number, chr(_PRIVATE + len(private)))
            result["".join([private[number] for number in ids])] += count
    return {letter: str(tokenizer.id_to_token(number)) for number, letter in private.items()}, result


def cuts(model: Tokenizer, words: Sequence[str]) -> Iterator[list[int]]:
    """Yield the ids of each word, in batches: what the library returns is large."""
    for start in range(0, len(words), _BATCH):
        batch = model.encode_batch_fast(words[start : start + _BATCH], add_special_tokens=False)
        yield from (encoding.ids for encoding in batch)


def _select(
    learned: Iterable[Sequence[str]],
    names: Mapping[str, str],
    old_tokens: Set[str],
    old_merges: Set[Merge],
    added_rows: int,
    banned: Set[str],
) -> tuple[list[str], list[Merge]]:
    """Spell learned merges in old tokens and take them in order until `added_rows` new tokens are there.

    A merge whose result already exists costs no row. Merges of parts that were not taken are left out.
    """
    known, pairs = set(old_tokens), set(old_merges)
    fresh: list[str] = []
    merges: list[Merge] = []
    for private in learned:
        left, right = ("".join(names[letter] for letter in half) for half in private)
        token = left + right
        if (left, right) in pairs or left not in known or right not in known or token in banned:
            continue
        if token not in known:
            if len(fresh) == added_rows:
                break
            known.add(token)
            fresh.append(token)
        pairs.add((left, right))
        merges.append((left, right))
    return fresh, merges


def _lists_every_split(merges: Sequence[Merge], known: Set[str]) -> bool:
    """Tell the families whose merges are all splits of each token from those with the one that made it."""
    tokens = {left + right for left, right in merges[:_SAMPLE]}  # the last ones may be an extension's
    possible = {pair for token in tokens for pair in _splits(token, known)}
    return len(possible & set(merges)) > 0.95 * len(possible)


def _splits(token: str, known: Set[str]) -> list[Merge]:
    halves = ((token[:middle], token[middle:]) for middle in range(1, len(token)))
    return [(left, right) for left, right in halves if left in known and right in known]
