"""The units of work of stages 5 and 7, as functions that worker processes can import.

Each is one model folder, built once (`freshness.cached`): continued pre-training of a base with its curve of
bits per byte, self-calibration answers, calibration of an instruct model.
"""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel

from ruadapt import data_sets, files, freshness, vocab
from ruadapt.data_sets import Row
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.asking import answers_to
from ruadapt.evaluation.perplexity import text_bits
from ruadapt.training.encoding import encode_chats, pack, read_blocks
from ruadapt.training.parallel import built_together
from ruadapt.training.trainable import TrainingOptions, TuningOptions
from ruadapt.training.trainer import fit


def adapt(
    source: Path,
    target: Path,
    corpus: Path,
    heldout: dict[str, Path],
    characters: int,
    epochs: int,
    evaluations: int,
    documents: int,
    block_size: int,
    options: dict[str, Any],
    logs: Path | None = None,
    original: Path | None = None,
    replay: Path | None = None,
    replay_share: float = 0.0,
) -> dict[str, Any]:
    """Continue pre-training of `source` on the first `characters` of a corpus; write the model to `target`.

    Under `accelerate launch` every process calls this with the same arguments; `batch_size` counts the
    sequences of all processes together.

    Args:
        source: a base with the vocabulary to train, tokenizer included.
        heldout: corpus of held-out text by language; the first `documents` of each make the curve.
        epochs: passes over the text; they, not a number of steps, make vocabularies comparable.
        evaluations: how many points the curve has after its first.
        options: of `TrainingOptions`, without `steps` and `evaluate_every`.
        logs: folder for TensorBoard.
        original: folder of the base before: the rows of tokens that it lacks are the new rows of
            `TrainingOptions`, and it is the teacher of `hidden_state_weight`.
        replay: corpus of the language that must not be forgotten, mixed in as `replay_share` of all
            characters (METHOD section 4).

    Returns:
        The report of `trainer.fit`, with `characters` and `documents` of the text, `replayed` characters and
        `evaluations: [{"step", "tokens", "ru", "en", …}]` in bits per byte.

    Raises:
        RuadaptError: as `fit`; the text is shorter than one batch.
    """
    # Of the original only what is read: hashing the weights of a large model takes minutes.
    teacher = original if options.get("hidden_state_weight") else None
    words = original and original / "tokenizer.json"
    key = freshness.key_of(locals(), besides=("target", "logs", "original"))

    def build(folder: Path, checkpoints: Path) -> dict[str, Any]:
        blocks, read = packed(checkpoints, source, corpus, characters, block_size, replay, replay_share)
        sequences = options["batch_size"] * options.get("accumulation", 1)
        steps = epochs * len(blocks) // sequences
        if not steps:
            raise RuadaptError(
                f"{corpus}: {read['documents']} texts make {len(blocks)} blocks of {block_size} tokens, less "
                f"than one batch of {sequences}; give more text or a smaller batch"
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        texts = {language: list(data_sets.read_texts(path))[:documents] for language, path in heldout.items()}

        def curve(model: PreTrainedModel, step: int) -> dict[str, Any]:
            windows = {"context": block_size, "stride": block_size // 2}
            spent = {name: text_bits(model, tokenizer, part, **windows) for name, part in texts.items()}
            return {language: float(bits.sum() / sizes.sum()) for language, (bits, sizes) in spent.items()}

        report = fit(
            source,
            blocks,
            folder,
            TrainingOptions(steps=steps, evaluate_every=max(1, steps // evaluations), **options),
            evaluate=curve,
            checkpoints=checkpoints,
            logs=logs,
            new_rows=_new_rows(source, original, options),
            teacher=teacher,
        )
        return report | read

    return built_together(target, key, build, "pretrain")


def packed(
    folder: Path,
    tokenizer: Path,
    corpus: Path,
    characters: int,
    block_size: int,
    replay: Path | None = None,
    replay_share: float = 0.0,
) -> tuple[Dataset, dict[str, int]]:
    """Pack the first `characters` of a corpus into `folder`, or map what a killed training packed there.

    As many characters of `replay` follow as make it `replay_share` of the whole.

    Returns:
        As `pack`, and `{"characters", "documents", "replayed"}` of the text: characters and documents of the
        corpus, characters of the replay.

    Raises:
        RuadaptError: as `pack` and `data_sets.read_texts`; a share outside of 0 … 1.
    """
    if not 0 <= replay_share < 1:
        raise RuadaptError(f"the replayed share is {replay_share}; it must be 0 or more and below 1")
    read = {"characters": 0, "documents": 0, "replayed": 0}

    def texts() -> Iterator[str]:
        for text in files.take_characters(data_sets.read_texts(corpus), characters):
            read["characters"] += len(text)
            read["documents"] += 1
            yield text
        wanted = round(read["characters"] * replay_share / (1 - replay_share))
        if replay and wanted:
            for text in files.take_characters(data_sets.read_texts(replay), wanted):
                read["replayed"] += len(text)
                yield text

    blocks, counts = folder / "blocks.arrow", folder / "read.json"  # the counts are the last to be written
    with PartialState().main_process_first():  # it packs; the others map its file
        if not counts.exists():
            folder.mkdir(parents=True, exist_ok=True)
            pack(texts(), AutoTokenizer.from_pretrained(tokenizer), block_size, blocks)
            files.write_json(counts, read)
    return read_blocks(blocks), files.read_json(counts)


def _new_rows(source: Path, original: Path | None, options: dict[str, Any]) -> list[int]:
    """Return the ids of the tokens that the original lacks, where they learn at a rate of their own."""
    same_rate = options.get("new_rows_learning_rate_factor", 1) == 1
    if original is None or same_rate or options.get("train", "all") != "all":
        return []
    new, old = vocab.load_tokenizer(source), vocab.load_tokenizer(original)
    known = dict([*vocab.shared_tokens(new, old), *vocab.shared_specials(new, old)])
    return [number for number in range(vocab.rows(new)) if number not in known]


def answer(model: Path, prompts: Path, target: Path, max_tokens: int) -> dict[str, int]:
    """Let the original instruct model answer prompts greedily, for self-calibration (METHOD section 6).

    `target/rows.jsonl` takes the prompts, rows with `messages`, each with its answer.

    Returns:
        How many there are and were left out: `{"answered", "empty", "unfinished" (cut at `max_tokens`),
        "broken" (special tokens inside)}`.

    Raises:
        RuadaptError: the model has no chat template or no eos token, or gave no usable answer.
    """
    asked = list(files.read_jsonl(prompts))
    special = {*AutoTokenizer.from_pretrained(model).all_special_ids}
    options: Any = {"max_tokens": max_tokens, "batch_size": 32}
    given = answers_to(target, model, [row["messages"] for row in asked], **options)
    counts, rows = Counter[str](), []
    for row, said in zip(asked, given, strict=True):
        fate = "unfinished" if said.cut else "answered" if said.text.strip() else "empty"
        if fate == "answered" and special & {*said.ids[:-1]}:
            fate = "broken"
        counts[fate] += 1
        if fate == "answered":
            rows.append(row | {"messages": [*row["messages"], {"role": "assistant", "content": said.text}]})
    if not rows:
        raise RuadaptError(f"{model} gave no usable answer to {len(asked)} prompts: {dict(counts)}")
    files.write_jsonl(target / "rows.jsonl", rows)
    return dict(counts)


def mix(rows: list[Row], others: list[Row], share: float, seed: int) -> list[Row]:
    """Return `rows` with `others` as exactly `share` of the whole (rounded); what is too many is left out.

    Raises:
        RuadaptError: `share` is not between 0 and 1, or one of the two is empty.
    """
    if not 0 < share < 1 or not rows or not others:
        raise RuadaptError(f"cannot mix {len(others)} rows as a share of {share} into {len(rows)} rows")
    total = min(len(rows) / (1 - share), len(others) / share)
    generator = random.Random(seed)
    own = generator.sample(rows, max(1, round(total * (1 - share))))
    return own + generator.sample(others, max(1, round(total * share)))


def calibrate(
    source: Path,
    target: Path,
    data: list[Path],
    copies: Path | None,
    share: float,
    options: dict[str, Any],
    logs: Path | None = None,
    original: Path | None = None,
    words: Path | None = None,
) -> dict[str, Any]:
    """Tune the chat model `source` on conversations; write the model to `target`, adapters merged.

    The loss is taken on the assistant's turns only.

    Args:
        data: files of chat rows, joined.
        copies: rows of the copy task, mixed in as `share` of all rows; None for none.
        options: of `TuningOptions`.
        logs: folder for TensorBoard.
        original: folder of the original instruct model: the rows of tokens that it lacks are the new rows of
            `TuningOptions`, and it is the teacher of `hidden_state_weight`.
        words: folder of another tokenizer, template and generation settings, for a base that lacks them.

    Returns:
        The report of `trainer.fit`, with `rows`, `dropped_rows` (longer than `max_length`) and `unused_rows`
        (that `mix` left out).

    Raises:
        RuadaptError: no chat template, a row it cannot render or without an answer, too few rows short
            enough, or as `fit` and `mix`; `target` is then left as it was.
    """
    teacher = original if options.get("hidden_state_weight") else None
    known = original and original / "tokenizer.json"
    key = freshness.key_of(locals(), besides=("target", "logs", "original"))

    def build(folder: Path, checkpoints: Path) -> dict[str, Any]:
        chosen = TuningOptions(**options)
        rows = [row for path in data for row in files.read_jsonl(path)]
        others = [] if copies is None else list(files.read_jsonl(copies))
        given = len(rows) + len(others)
        rows = rows if copies is None else mix(rows, others, share, chosen.seed)
        encoded = encode_chats(rows, AutoTokenizer.from_pretrained(words or source))
        kept = [example for example in encoded if example["length"] <= chosen.max_length]
        if not kept:
            raise RuadaptError(f"all {len(rows)} chat rows are longer than max_length {chosen.max_length}")
        if chosen.passes:
            most = chosen.passes * len(kept) / (chosen.batch_size * chosen.accumulation)
            chosen = TuningOptions(**options | {"steps": min(chosen.steps, max(1, round(most)))})
        report = fit(
            source,
            Dataset.from_list(kept),
            folder,
            chosen,
            checkpoints=checkpoints,
            logs=logs,
            new_rows=_new_rows(words or source, original, options),
            teacher=teacher,
            words=words,
        )
        counts = {"rows": len(kept), "dropped_rows": len(rows) - len(kept), "unused_rows": given - len(rows)}
        return report | counts

    return built_together(target, key, build, "calibrate")
