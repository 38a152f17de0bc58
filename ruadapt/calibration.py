"""Calibration after LEP: chat fine-tuning on answers, with LoRA or whole, and self-calibration answers.

METHOD section 6: the propagated model is tuned on answers of the ORIGINAL instruct model (self-calibration),
or on instruction data with or without a copy task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from peft import LoraConfig, get_peft_model
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.training import TrainingOptions, bfloat16_is_native, fit, load_for_training, save_model

IGNORED = -100
PADDING = 16
Message = dict[str, str]


@dataclass(frozen=True)
class TuningOptions(TrainingOptions):
    """How to tune. `lora_rank` None tunes the weights themselves; otherwise LoRA on all linear layers.

    `train_embeddings` trains the embeddings (and an untied head) too: with LoRA beside the adapters, without
    it as part of the whole. Rows longer than `max_length` tokens are left out, never cut: a cut answer would
    teach to stop early or not at all. The LoRA defaults are METHOD's (rank 32, alpha 32).
    """

    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    lora_rank: int | None = 32
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    train_embeddings: bool = True
    max_length: int = 512


def finetune(
    model_folder: Path,
    rows: Sequence[dict[str, Any]],
    target: Path,
    options: TuningOptions,
    logs: Path | None = None,
) -> dict[str, Any]:
    """Tune a chat model on conversations and write the model folder `target`, adapters merged.

    Args:
        model_folder: the model to tune; its own tokenizer and chat template are used.
        rows: chat rows with `messages`; the loss is taken on the assistant's turns only.
        logs: folder for TensorBoard.

    Returns:
        What `training.fit` reports (tokens by the rows' mean length), and `rows`, `dropped_rows`,
        `answer_tokens` (of one pass over the rows).

    Raises:
        RuadaptError: no chat template, a row it cannot render or without an answer, too few rows short
            enough, or as `training.pretrain`; `target` is then left as it was.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    examples = encode_chats(rows, tokenizer)
    kept = [example for example in examples if len(example["input_ids"]) <= options.max_length]
    if not kept:
        raise RuadaptError(
            f"every one of {len(rows)} chat rows is longer than max_length {options.max_length}"
        )
    network, dtype = load_for_training(model_folder, options.seed)
    tuned = _prepare(network, options)
    mean_length = round(sum(example["length"] for example in kept) / len(kept))
    report = fit(
        tuned,
        Dataset.from_list(kept),
        collate_chats,
        options,
        tokens_per_sequence=mean_length,
        by_length=True,
        logs=logs,
    )
    if options.lora_rank is not None:
        network = tuned.merge_and_unload()
    save_model(network, model_folder, target, dtype)
    answer_tokens = sum(label != IGNORED for example in kept for label in example["labels"])
    return report | {
        "rows": len(kept),
        "dropped_rows": len(rows) - len(kept),
        "answer_tokens": answer_tokens,
    }


def _prepare(network: PreTrainedModel, options: TuningOptions) -> Any:
    """Return the model to train: `network` itself, or peft's wrapper around it."""
    embeddings = [network.get_input_embeddings()]
    if not network.config.tie_word_embeddings:
        embeddings.append(network.get_output_embeddings())
    if options.lora_rank is None:
        for module in embeddings:
            module.requires_grad_(options.train_embeddings)
        return network
    names = [name for name, module in network.named_modules() if any(module is own for own in embeddings)]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        modules_to_save=names if options.train_embeddings else None,
        # Without it the merge would give a tied model a head of its own.
        ensure_weight_tying=options.train_embeddings and bool(network.config.tie_word_embeddings),
    )
    return get_peft_model(network, config)


def encode_chats(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Tokenise conversations by the tokenizer's chat template, with labels on the assistant's turns only.

    An assistant's turn is what the template adds behind the generation prompt, its end token included: the
    tokens of the conversation up to this turn that do not begin the prompt's tokens.

    Returns:
        For each row `{"input_ids": ids, "labels": ids or -100, "length": their number}`.

    Raises:
        RuadaptError: no chat template, a row without `messages` or an assistant's turn, or one whose earlier
            turns the template renders otherwise once an answer follows.
    """
    if not tokenizer.chat_template:
        raise RuadaptError("the tokenizer has no chat template; add chat_template.jinja to the model folder")
    turns: list[tuple[int, str, str]] = []
    for number, row in enumerate(rows):
        turns += [(number, *turn) for turn in _turns(row, number, tokenizer)]
    prompts = _encode([prompt for _, prompt, _ in turns], tokenizer)
    conversations = _encode([conversation for _, _, conversation in turns], tokenizer)
    examples: list[dict[str, Any]] = [{} for _ in rows]
    for (number, _, _), prompt, ids in zip(turns, prompts, conversations, strict=True):
        # Tokens that reach over the border belong to the answer.
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
        earlier = examples[number].get("labels", [])
        labels = earlier + [IGNORED] * (shared - len(earlier)) + ids[shared:]
        if len(labels) != len(ids):
            raise RuadaptError(f"chat row {number}: the turns' tokens do not follow one another")
        examples[number] = {"input_ids": ids, "labels": labels, "length": len(ids)}
    return examples


def _turns(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Return (prompt, prompt with answer) as text for each assistant's turn."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not any(m.get("role") == "assistant" for m in messages):
        raise RuadaptError(f"chat row {number} has no `messages` with a turn of the assistant")
    turns = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:place], tokenizer, number, prompt=True)
        conversation = render(messages[: place + 1], tokenizer, number, prompt=False)
        if not conversation.startswith(prompt):
            raise RuadaptError(
                f"chat row {number}: the chat template changes the prompt once an answer follows, "
                "so the answer cannot be told from it"
            )
        turns.append((prompt, conversation))
    return turns


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, number: int, prompt: bool) -> str:
    """Return a conversation as text, with the generation prompt if `prompt`; `number` names it in errors."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, TypeError, KeyError) as error:
        raise RuadaptError(f"chat row {number} cannot be rendered by the chat template: {error}") from error


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])


def collate_chats(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right to a multiple of 16 tokens, int64 [batch, length]; labels of padding are -100.

    The CPU's kernels are made anew for every shape, and kept: few shapes save a fifth of the time and a third
    of the memory.

    Padding stands behind every real token, where causal attention never looks: no attention mask is needed,
    and the fast attention kernels stay in use.
    """
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    missing = -batch["input_ids"].shape[1] % PADDING
    return {
        name: pad(rows, (0, missing), value=IGNORED if name == "labels" else 0)
        for name, rows in batch.items()
    }


@torch.inference_mode()
def answer_prompts(
    model_folder: Path,
    prompts: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Let a chat model answer prompts greedily: the data of self-calibration (METHOD section 6).

    Args:
        model_folder: the ORIGINAL instruct model.
        prompts: rows with `messages` that end with the user's turn; other columns are kept.

    Returns:
        The answered rows in the order of `prompts`, and how many there are and were dropped:
        `{"answered", "empty", "unfinished" (cut at `max_new_tokens`), "broken" (special tokens inside)}`.

    Raises:
        RuadaptError: the model has no chat template or no eos token, or gave no usable answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    # Elsewhere than in native bfloat16 a CPU computes it slower than float32.
    dtype = "auto" if bfloat16_is_native() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).eval()
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    eos = model.generation_config.eos_token_id
    stops = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if not tokenizer.chat_template or not stops:
        raise RuadaptError(f"{model_folder} is not a chat model: it has no chat template or no eos token")
    texts = [render(row["messages"], tokenizer, number, prompt=True) for number, row in enumerate(prompts)]
    encoded = _encode(texts, tokenizer)
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    counts = {"answered": 0, "empty": 0, "unfinished": 0, "broken": 0}
    answers: dict[int, str] = {}
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="answers", unit="batch", disable=not progress):
        batch = order[start : start + batch_size]
        ids = pad_sequence([torch.tensor(encoded[n]) for n in batch], batch_first=True, padding_side="left")
        mask = pad_sequence(
            [torch.ones(len(encoded[n])) for n in batch], batch_first=True, padding_side="left"
        )
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.long().to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=min(stops),
        )
        for number, answer in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            tokens = list(takewhile(lambda token: token not in stops, answer))
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            if len(tokens) == len(answer):
                counts["unfinished"] += 1
            elif not text.strip():
                counts["empty"] += 1
            elif set(tokens) & set(tokenizer.all_special_ids):
                counts["broken"] += 1
            else:
                counts["answered"] += 1
                answers[number] = text
    if not answers:
        raise RuadaptError(f"{model_folder} gave no usable answer to {len(prompts)} prompts: {counts}")
    rows = []
    for number, text in sorted(answers.items()):
        row = prompts[number]
        rows.append({**row, "messages": [*row["messages"], {"role": "assistant", "content": text}]})
    return rows, counts
