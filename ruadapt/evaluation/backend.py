"""A model behind lm-evaluation-harness's interface, quick on small models: shared prompt parts run once."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.models import start_token
from ruadapt.training.generation import maximum_length

# A common beginning shorter than this is not worth a forward pass of its own.
_SHARED_AT_LEAST = 48
# A batch takes no more tokens than `batch_size` prompts of this length, answers included.
_PROMPT_TOKENS = 512

Request = tuple[tuple[str, str], list[int], list[int]]


class Backend(TemplateLM):
    """Log-likelihoods and greedy answers of one loaded model.

    The harness's own `hf` backend runs every choice of a question, and the few-shot examples of every
    question, from the first token on. Here each prompt runs once for all its choices, and the beginning that
    all prompts of a batch share (the examples) once per batch; the numbers are the same. No prompt is
    truncated: one that does not fit the model's context is an error. Special tokens are never added silently.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: prompts per forward pass, fewer where they are long.
        quiet: show no progress bars.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        quiet: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.cut: set[str] = set()
        """Prompts whose answer did not end before the limit."""
        self._encoded: dict[str, list[int]] = {}
        # Straight to the Rust core: without offsets and wrapping, encoding takes 0.6 of the time.
        core = getattr(tokenizer, "backend_tokenizer", None)
        self._core = core if core and core.truncation is None and core.padding is None else None
        # The harness's own bars, one per task, are silenced through sys.stderr; these stay.
        self._bars = None if quiet else sys.stderr

    @property
    def eot_token_id(self) -> int:
        """The token that starts raw texts (and is the context where there is none)."""
        return start_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """The folder the tokenizer came from."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of `string`, in which special tokens are spelt out."""
        if string not in self._encoded:
            if self._core:
                (encoded,) = self._core.encode_batch_fast([string], add_special_tokens=False)
                self._encoded[string] = encoded.ids
            else:
                found = self.tokenizer(string, add_special_tokens=False, verbose=False)
                self._encoded[string] = found["input_ids"]
        return self._encoded[string]

    def count(self, string: str) -> int:
        """Return the number of tokens of `string`."""
        return len(self.tok_encode(string))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the conversation as text in the model's own format."""
        if not self.tokenizer.chat_template:
            raise RuadaptError(
                f"{self.tokenizer_name} has no chat template; evaluate it as a base model, few-shot"
            )
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt exactly as free generation would see them, and those behind it.

        The harness would move the line break of `Answer:\\n` to the answer and cut the ids at the length of
        the rest; a vocabulary that has `:\\n` as one token then loses the break. Only a trailing space is
        moved, for it belongs to the next word in most vocabularies.
        """
        spaces = len(context) - len(context.rstrip(" "))
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, self.tok_encode(continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not offered: `ruadapt.evaluation.perplexity` scores whole texts."""
        raise RuadaptError("whole texts are scored by ruadapt.evaluation.perplexity.bits_per_byte")

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        owners: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise RuadaptError(
                    f"an answer to {requests[number][0][0][-80:]!r} is empty; it has no probability"
                )
            owners[tuple(context)].append(number)
        results: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(list(owners), "questions"):
            asked = [owners[context] for context in batch]
            longest = max(len(requests[number][2]) for numbers in asked for number in numbers)
            logits, cache, mask = self._read(batch, longest)
            answers = [(row, number) for row, numbers in enumerate(asked) for number in numbers]
            targets = [requests[number][2] for _, number in answers]
            rows = torch.tensor([row for row, _ in answers], device=self.model.device)
            scores = self._continue(logits, cache, mask, rows, targets)
            results.update(zip((number for _, number in answers), scores, strict=True))
        return [results[number] for number in range(len(requests))]

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer greedily until an end token, a stop string (`until`, left out), `max_gen_toks` tokens or
        the end of the model's positions."""
        asked = [self._asked(*request.args) for request in requests]
        groups: dict[tuple[tuple[str, ...], int], dict[tuple[int, ...], str]] = defaultdict(dict)
        for prompt, until, limit in asked:
            groups[until, limit][tuple(self.tok_encode(prompt))] = prompt
        answers: dict[tuple[str, tuple[str, ...], int], str] = {}
        for (until, limit), prompts in groups.items():
            for batch in self._batches(list(prompts), "answers", limit):
                for ids, (text, ended) in zip(batch, self._answers(batch, until, limit), strict=True):
                    answers[prompts[ids], until, limit] = text
                    if not ended:
                        self.cut.add(prompts[ids])
        return [answers[key] for key in asked]

    def _asked(self, prompt: str, arguments: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
        """Return a prompt, its stop strings and the limit of its answer: at least one token, so that a
        prompt without room for it is refused."""
        room = maximum_length(self.model) - self.count(prompt)
        return prompt, tuple(arguments.get("until", ())), max(1, min(int(arguments["max_gen_toks"]), room))

    def _answers(
        self, batch: list[tuple[int, ...]], until: tuple[str, ...], limit: int
    ) -> Iterator[tuple[str, bool]]:
        ids, mask, cache = self._prefilled(batch, limit)
        configured = self.model.generation_config.eos_token_id
        ends = set(configured if isinstance(configured, list) else [configured]) | {
            self.tokenizer.eos_token_id
        }
        ends.discard(None)
        stops = StoppingCriteriaList([_StopStrings(self.tokenizer, until, ids.shape[1])] if until else [])
        output = self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=sorted(ends),
            pad_token_id=min(ends),
            stopping_criteria=stops,
        )
        for row in output[:, ids.shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            text = str(
                self.tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )
            found = [text.index(stop) for stop in until if stop in text]
            yield text[: min(found, default=len(text))], bool(found) or end < len(row)

    def _batches(
        self, prompts: list[tuple[int, ...]], what: str, room: int = 0
    ) -> Iterator[list[tuple[int, ...]]]:
        """Yield batches of like length, prompts with the same examples in front kept together.

        `room` is what each prompt takes besides, in tokens.
        """
        starts = Counter(prompt[:_SHARED_AT_LEAST] for prompt in prompts)

        def place(prompt: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
            start = prompt[:_SHARED_AT_LEAST]
            return (start if starts[start] > max(1, self.batch_size // 8) else (), len(prompt))

        families: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
        for prompt in sorted(prompts, key=place):
            families[place(prompt)[0]].append(prompt)
        with tqdm(
            total=len(prompts), desc=what, disable=self._bars is None, file=self._bars, leave=False
        ) as progress:
            for family in families.values():
                batch: list[tuple[int, ...]] = []
                for prompt in family:  # from the shortest on
                    tokens = (len(batch) + 1) * (len(prompt) + room)
                    if batch and (len(batch) == self.batch_size or tokens > self.batch_size * _PROMPT_TOKENS):
                        yield batch
                        progress.update(len(batch))
                        batch = []
                    batch.append(prompt)
                yield batch
                progress.update(len(batch))

    def _prefilled(
        self, batch: Sequence[tuple[int, ...]], room: int
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """Lay prompts out as `[shared beginning | padding | rest]`, the beginning already in the cache.

        Returns:
            ids and mask `(prompts, length)` of the whole layout, and the cache of the shared beginning (empty
            where there is none worth it).
        """
        longest = max(len(prompt) for prompt in batch)
        if longest + room > maximum_length(self.model):
            raise RuadaptError(
                f"a prompt of {longest} tokens and an answer of {room} do not fit the model's "
                f"{maximum_length(self.model)} positions; use fewer examples (shots) or shorter items"
            )
        shared = _common(batch) if len(batch) > 1 else 0
        if shared < _SHARED_AT_LEAST:
            shared = 0
        ids = torch.full((len(batch), longest), batch[0][0])
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            rest = len(prompt) - shared
            ids[row, :shared] = torch.tensor(prompt[:shared])
            ids[row, longest - rest :] = torch.tensor(prompt[shared:])
            mask[row, :shared] = 1
            mask[row, longest - rest :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        cache = DynamicCache(config=self.model.config)
        if shared:
            self.model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(batch))
        return ids, mask, cache

    def _read(
        self, batch: Sequence[tuple[int, ...]], room: int
    ) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """Return the logits behind each prompt `(prompts, rows)`, the prompts' cache and their mask."""
        ids, mask, cache = self._prefilled(batch, room)
        done = cache.get_seq_length()
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.model(
            input_ids=ids[:, done:],
            attention_mask=mask,
            position_ids=places[:, done:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits.float(), cache, mask

    def _continue(
        self,
        logits: torch.Tensor,
        cache: DynamicCache,
        mask: torch.Tensor,
        rows: torch.Tensor,
        targets: list[list[int]],
    ) -> list[tuple[float, bool]]:
        """Score `targets[i]` behind prompt `rows[i]` (float32); tell whether it is the greedy answer."""
        longest = max(len(target) for target in targets)
        padded = torch.zeros(len(targets), longest, dtype=torch.long, device=self.model.device)
        real = torch.zeros_like(padded)
        for row, target in enumerate(targets):
            padded[row, : len(target)] = torch.tensor(target)
            real[row, : len(target)] = 1
        every = logits[rows].unsqueeze(1)
        if longest > 1:
            cache.batch_select_indices(rows)
            before = mask[rows]
            behind = self.model(
                input_ids=padded[:, :-1],
                attention_mask=torch.cat([before, real[:, :-1]], dim=1),
                position_ids=before.sum(-1, keepdim=True) + torch.arange(longest - 1, device=rows.device),
                past_key_values=cache,
                use_cache=True,
            ).logits
            every = torch.cat([every, behind.float()], dim=1)
        spent = every.log_softmax(-1).gather(-1, padded.unsqueeze(-1)).squeeze(-1)
        sums = (spent.double() * real).sum(-1)
        greedy = ((every.argmax(-1) == padded) | (real == 0)).all(-1)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))


class _StopStrings(StoppingCriteria):
    """Ends each row of a batch for itself once its answer holds one of the strings."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, strings: tuple[str, ...], prompt_length: int
    ) -> None:
        self._tokenizer = tokenizer
        self._strings = strings
        self._prompt_length = prompt_length
        # Each token adds at least one byte, so a string ends within as many tokens as it has bytes.
        self._tokens = max(len(string.encode()) for string in strings)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        recent = input_ids[:, self._prompt_length :][:, -self._tokens :].tolist()
        texts = self._tokenizer.batch_decode(recent)
        found = [any(string in text for string in self._strings) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _common(batch: Sequence[tuple[int, ...]]) -> int:
    """Return how many first ids all prompts share, at least one of each prompt left over."""
    first, last = min(batch), max(batch)  # in the order of sequences: what these two share, all share
    limit = min(len(prompt) for prompt in batch) - 1
    for place in range(limit):
        if first[place] != last[place]:
            return place
    return limit
