"""Extending a BPE vocabulary with real merges, and shrinking it first (METHOD, sec. 2: Extended, Optimized).

How new merges continue the old ones: the words of the wanted script are cut with the old merges; each old id
becomes one private character; the native BPE trainer then learns merges of those characters from the word
counts; the learned merges are spelled back and appended. Old merges come first in rank, so a text that holds
nothing of the wanted script keeps its exact ids.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ruadapt.errors import RuadaptError
from ruadapt.vocab.spec import (
    SPACE_MARK,
    Spec,
    as_list,
    bare,
    build,
    byte_letters,
    is_byte_level,
    load_tokenizer,
    place,
    read_spec,
    repeated,
    rows,
    special_ids,
    with_model,
)
from ruadapt.vocab.surface import fallback_tokens, letter_script

Merge = tuple[str, str]
_PRIVATE = 0xF0000  # planes 15 and 16: room for 131,068 old ids
_PRIVATE_ROOM = 131_068


def extend(
    original_folder: Path | str,
    texts: Iterable[str],
    added_rows: int,
    scripts: Sequence[str] = ("Cyrillic",),
    min_frequency: int = 2,
) -> Tokenizer:
    """Append exactly `added_rows` tokens and the merges that reach them behind the old vocabulary.

    Every old id stays, special tokens included; the old merges stay an exact prefix; new tokens are in the
    model's vocabulary, never added tokens; each of them is what the merges make of its own surface.

    Args:
        original_folder: folder with the original's tokenizer.json (byte-level or SentencePiece BPE).
        texts: corpus; only its words in `scripts` are learned from.
        added_rows: exact number of new rows.
        scripts: names as Unicode spells them ("Cyrillic", "Greek", "Georgian", …).
        min_frequency: a merge must occur at least so often.

    Raises:
        RuadaptError: not a BPE model; no word in the wanted scripts; fewer rows possible than asked for.
    """
    return _extend(load_tokenizer(original_folder), texts, added_rows, scripts, min_frequency)


def optimize(
    original_folder: Path | str,
    texts: Iterable[str],
    keep_rows: int,
    added_rows: int,
    scripts: Sequence[str] = ("Cyrillic",),
    min_frequency: int = 2,
    used_on: Iterable[str] | None = None,
) -> Tokenizer:
    """Prune the old vocabulary to exactly `keep_rows` ordinary tokens, number anew, then extend.

    Kept are all single bytes, all special tokens (on top of `keep_rows`; at their own ids where those still
    exist) and the first tokens by id, or those used most on `used_on`, each with every token that its own
    merges pass through. Rows of the result: keep_rows + special tokens + added_rows.

    Raises:
        RuadaptError: as `extend`; `keep_rows` outside what bytes need and the vocabulary has.
    """
    original = load_tokenizer(original_folder)
    usage: Counter[int] = Counter()
    if used_on is not None:
        for encoding in original.encode_batch(as_list(used_on), add_special_tokens=False):
            usage.update(encoding.ids)
    pruned = _prune(original, keep_rows, usage)
    spec = read_spec(_extend(pruned, texts, added_rows, scripts, min_frequency))
    specials = special_ids(original)
    ordinary = [token for token in _by_id(spec["model"]["vocab"]) if token not in specials]
    ids = place(ordinary, specials)
    return build(with_model(spec, {**spec["model"], "vocab": ids}, ids))


def reachable(tokenizer: Tokenizer, tokens: Iterable[str]) -> dict[str, bool]:
    """Tell for each token whether the merges alone make exactly that token of its own surface.

    Tokens are in the model's spelling. A vocabulary with `ignore_merges` is judged without that short cut.
    """
    model = read_spec(tokenizer)["model"]
    judge = bare(tokenizer)
    if model.get("ignore_merges"):
        plain = {**model, "ignore_merges": False}
        judge = build({**read_spec(judge), "model": plain})
    wanted = list(tokens)
    encodings = judge.encode_batch(wanted, add_special_tokens=False)
    return {token: encoding.tokens == [token] for token, encoding in zip(wanted, encodings, strict=True)}


def _extend(
    tokenizer: Tokenizer, texts: Iterable[str], added_rows: int, scripts: Sequence[str], min_frequency: int
) -> Tokenizer:
    spec = read_spec(tokenizer)
    if spec["model"]["type"] != "BPE":
        raise RuadaptError(
            f"a {spec['model']['type']} vocabulary cannot be extended by merges; replace it instead"
        )
    if added_rows < 1:
        raise RuadaptError(f"added_rows is {added_rows}; ask for at least one")
    names, words = _private_words(tokenizer, _script_words(as_list(texts), tokenizer, scripts))
    known = {*spec["model"]["vocab"], *special_ids(tokenizer)}
    pairs = {(left, right) for left, right in spec["model"]["merges"]}
    banned: set[str] = set()
    requested = added_rows + added_rows // 50 + 64
    learned = _learn(words, requested, min_frequency)
    while True:
        fresh, merges = _select(learned, names, known, pairs, added_rows, banned)
        if len(fresh) < added_rows:
            if len(learned) < requested:
                raise RuadaptError(
                    f"added_rows {added_rows}: only {len(fresh)} rows are possible with this corpus and "
                    f"min_frequency {min_frequency}; ask for fewer or give more text"
                )
            requested += max(64, 2 * (added_rows - len(fresh)))
            learned = _learn(words, requested, min_frequency)
            continue
        result = _append(tokenizer, spec, fresh, merges)
        # A learned merge whose result is an old token joins two symbols that the trainer kept apart, and so
        # can pre-empt a later merge. Tokens that lose their path are dropped, others take their rows.
        lost = {token for token, found in reachable(result, fresh).items() if not found}
        if not lost:
            return result
        banned |= lost


def _script_words(texts: list[str], tokenizer: Tokenizer, scripts: Sequence[str]) -> Counter[str]:
    """Count the words of the wanted scripts, with the space before them, in the model's spelling."""
    if tokenizer.normalizer is not None:
        texts = [tokenizer.normalizer.normalize_str(text) for text in texts]
    letters = {letter for letter in set().union(*map(set, texts)) if letter_script(letter) in scripts}
    if not letters:
        raise RuadaptError(
            f"the corpus has no letter of {', '.join(scripts)}; give text in that script or other `scripts`"
        )
    # Only a space may come along: punctuation glued to a word would teach merges that touch other text.
    pattern = re.compile(f"[ {SPACE_MARK}]?[{''.join(map(re.escape, sorted(letters)))}]+")
    found: Counter[str] = Counter()
    for text in texts:
        found.update(pattern.findall(text))
    if tokenizer.pre_tokenizer is None:
        return Counter({word.replace(" ", SPACE_MARK): count for word, count in found.items()})
    words: Counter[str] = Counter()
    for word, count in found.items():
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(word):
            words[piece] += count
    return words


def _private_words(tokenizer: Tokenizer, words: Counter[str]) -> tuple[dict[str, str], Counter[str]]:
    """Cut words with the old merges and spell old ids as private characters.

    Returns {private character: old token} and the counts of words of two pieces or more.
    """
    encodings = bare(tokenizer).encode_batch(list(words), add_special_tokens=False)
    unmergeable = set(fallback_tokens(tokenizer).values()) | {
        tokenizer.token_to_id(tokenizer.model.unk_token or "")
    }
    private: dict[int, str] = {}
    result: Counter[str] = Counter()
    for encoding, count in zip(encodings, words.values(), strict=True):
        ids = encoding.ids
        if len(ids) < 2 or not unmergeable.isdisjoint(ids):
            continue
        for number in ids:
            if number not in private:
                private[number] = chr(_PRIVATE + len(private))
        result["".join(private[number] for number in ids)] += count
    if len(private) > _PRIVATE_ROOM:
        raise RuadaptError(
            f"the corpus uses {len(private)} old tokens; at most {_PRIVATE_ROOM} can be continued"
        )
    return {letter: str(tokenizer.id_to_token(number)) for number, letter in private.items()}, result


def _learn(words: Mapping[str, int], merges: int, min_frequency: int) -> list[Merge]:
    """Learn up to `merges` merges from word counts with the native trainer."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    alphabet = len(set().union(*map(set, words)))
    trainer = trainers.BpeTrainer(
        vocab_size=alphabet + merges, min_frequency=min_frequency, special_tokens=[], show_progress=False
    )
    learner.train_from_iterator(repeated(words, "\n"), trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def _select(
    learned: Sequence[Merge],
    names: Mapping[str, str],
    old_tokens: set[str],
    old_pairs: set[Merge],
    added_rows: int,
    banned: set[str],
) -> tuple[list[str], list[Merge]]:
    """Spell learned merges in old tokens and take them in order until `added_rows` new tokens are there.

    A merge whose result already exists costs no row. Merges of parts that were not taken are left out.
    """
    known, pairs = set(old_tokens), set(old_pairs)
    fresh: list[str] = []
    merges: list[Merge] = []
    for private_left, private_right in learned:
        left = "".join(names[letter] for letter in private_left)
        right = "".join(names[letter] for letter in private_right)
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


def _append(tokenizer: Tokenizer, spec: Spec, fresh: Sequence[str], merges: Sequence[Merge]) -> Tokenizer:
    """Write special tokens into the vocabulary at their own ids and number the new tokens behind all of them.

    Without that the library would renumber added tokens behind the grown vocabulary.
    """
    vocabulary = {**spec["model"]["vocab"], **special_ids(tokenizer)}
    start = rows(tokenizer)
    vocabulary.update({token: start + number for number, token in enumerate(fresh)})
    joined = [*spec["model"]["merges"], *(list(merge) for merge in merges)]
    return build({**spec, "model": {**spec["model"], "vocab": vocabulary, "merges": joined}})


def _prune(tokenizer: Tokenizer, keep_rows: int, usage: Mapping[int, int]) -> Tokenizer:
    spec = read_spec(tokenizer)
    model = spec["model"]
    if model["type"] != "BPE":
        raise RuadaptError(f"a {model['type']} vocabulary cannot be pruned by merges; replace it instead")
    specials = special_ids(tokenizer)
    vocabulary = {token: number for token, number in model["vocab"].items() if token not in specials}
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    kept = _base_tokens(tokenizer, vocabulary)
    if not len(kept) <= keep_rows <= len(vocabulary):
        raise RuadaptError(
            f"keep_rows {keep_rows}: this vocabulary needs {len(kept)} rows for its bytes and has "
            f"{len(vocabulary)} ordinary tokens"
        )
    for token in sorted(vocabulary, key=lambda token: (-usage.get(vocabulary[token], 0), vocabulary[token])):
        if len(kept) == keep_rows:
            break
        needed = {token, *token, *_path(token, ranks)} - kept
        if len(kept) + len(needed) <= keep_rows:
            kept |= needed
    if len(kept) < keep_rows:
        raise RuadaptError(f"keep_rows {keep_rows} can't be met exactly; {len(kept)} rows are possible")
    # Dropping merges off a token's own path leaves the lowest-ranked pair of each step where it was: every
    # kept token stays reachable.
    merges = [
        [left, right]
        for left, right in model["merges"]
        if left in kept and right in kept and left + right in kept
    ]
    ids = place([token for token in _by_id(vocabulary) if token in kept], specials)
    return build(with_model(spec, {**model, "vocab": ids, "merges": merges}, ids))


def _base_tokens(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> set[str]:
    """Return the tokens that spell every text: bytes, or all characters where there is no byte fallback."""
    if is_byte_level(tokenizer):
        return set(byte_letters()) & set(vocabulary)
    fallback = {f"<0x{byte:02X}>" for byte in fallback_tokens(tokenizer)}
    return fallback or {token for token in vocabulary if len(token) == 1}


def _path(token: str, ranks: Mapping[Merge, int]) -> list[str]:
    """Return every token that the merges make on the way from single letters to `token`."""
    symbols = list(token)
    made = []
    while len(symbols) > 1:
        pairs = pairwise(symbols)
        rank, position = min((ranks.get(pair, len(ranks)), index) for index, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        symbols[position : position + 2] = [symbols[position] + symbols[position + 1]]
        made.append(symbols[position])
    return made


def _by_id(vocabulary: Mapping[str, int]) -> list[str]:
    return sorted(vocabulary, key=vocabulary.__getitem__)
