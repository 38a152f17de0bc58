"""How many Russian stems tokenizers leave whole: `python -m benchmarks.stems FOLDER … --text FILE`."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Annotated

import typer
from pymorphy3 import MorphAnalyzer
from tokenizers import Tokenizer

from ruadapt.data_sets import read_texts
from ruadapt.vocab import fetch_tokenizer, token_bytes
from ruadapt.vocab.measure import count_words


def stems_whole(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return the share of running Russian words whose stem no token boundary cuts.

    The stem is the longest common beginning of all forms of the word's lexeme (pymorphy3, its likeliest
    reading; comparatives and superlatives aside, which change stems). Words that the dictionary lacks or
    whose forms share no two letters are left out.
    """
    words = count_words(texts)
    stems = _stems(words)
    sizes = [len(surface or b"") for surface in token_bytes(tokenizer)]
    encodings = tokenizer.encode_batch_fast([f"а {word}" for word in stems], add_special_tokens=False)
    total = whole = 0
    for encoding, (word, stem) in zip(encodings, stems.items(), strict=True):
        length, ending = len(word.encode()), len(word[stem:].encode())
        # Counted from the end: what stands before the word doesn't matter.
        ends = accumulate(sizes[number] for number in reversed(encoding.ids))
        total += words[word]
        whole += words[word] * all(end <= ending or end >= length for end in ends)
    return whole / max(total, 1)


def _stems(words: Iterable[str]) -> dict[str, int]:
    """Return the number of letters of each known word's stem."""
    analyzer = MorphAnalyzer()
    lexemes: dict[tuple[str, str], str] = {}
    found = {}
    for word in words:
        if not analyzer.word_is_known(word.lower()):
            continue
        parse = analyzer.parse(word.lower())[0]
        key = parse.normal_form, str(parse.tag.POS)
        if key not in lexemes:
            forms = [form for form in parse.lexeme if not {"COMP", "Supr"} & form.tag.grammemes]
            lexemes[key] = _common_beginning([form.word.replace("ё", "е") for form in forms])
        stem = lexemes[key]
        if len(stem) > 1 and word.lower().replace("ё", "е").startswith(stem):
            found[word] = len(stem)
    return found


def _common_beginning(words: Sequence[str]) -> str:
    # What the first and the last word in sorted order share, all between them share.
    pairs = zip(min(words, default=""), max(words, default=""), strict=False)
    return "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def main(
    tokenizers: Annotated[list[str], typer.Argument(help="Folders or hub names.")],
    text: Annotated[Path, typer.Option(help="Russian text.")],
) -> None:
    """Print the share for each tokenizer."""
    texts = list(read_texts(text))
    for name in tokenizers:
        typer.echo(f"{name:<60} {stems_whole(fetch_tokenizer(name), texts):.3f}")


if __name__ == "__main__":
    typer.run(main)
