"""The harness's own `hf` backend, mended where it would ask or read something else than the task says."""

import copy
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from os.path import commonprefix
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.models import LOGITS, end_tokens
from ruadapt.training.generation import maximum_length

Request = tuple[tuple[str, str], list[int], list[int]]
Ids = tuple[int, ...]

WORTH_SHARING = 48
"""A common beginning of fewer tokens is not worth a forward pass of its own."""

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of tasks and models that are built in code


class Backend(HFLM):
    """Log-likelihoods and greedy answers of one loaded model.

    What differs from `HFLM`: the cut between prompt and answer (`_encode_pair`); a prompt that does not fit
    the model's positions is an error, where `HFLM` drops its beginning; an answer ends at every end token of
    the model or its tokenizer; special tokens are never added; answers that the limit ended are known.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: free answers per forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
    ) -> None:
        options = {"batch_size": batch_size, "max_length": maximum_length(model), "add_bos_token": False}
        super().__init__(model, tokenizer=tokenizer, **options)
        self.tokenizer.clean_up_tokenization_spaces = False  # a space before a comma is part of an answer
        # A prompt is asked for with each of its answers.
        self.tok_encode = cache(super().tok_encode)
        self.cut: set[str] = set()
        """Prompts whose answer did not end before the limit."""

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

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return `(log p(answer | prompt), whether it is the greedy answer)` of each request.

        Prompts run in the order of their ids through one cache: each runs once for all its choices, and what
        it shares with the one before (the examples) is not read again. `HFLM` reads all of it for every
        choice: 34 CPU seconds more for the world's tasks with five examples, which take the embedded base 12
        in all, and 2 more zero-shot, where the instruct model takes 10 (12 items a task).
        """
        asked: dict[Ids, list[int]] = defaultdict(list)
        for number, (_, ids, _) in enumerate(requests):
            asked[tuple(ids)].append(number)
        scores: dict[int, tuple[float, bool]] = {}
        read = DynamicCache()
        before: Ids = ()
        for prompt, numbers in sorted(asked.items()):
            answers = [torch.tensor(requests[number][2], dtype=torch.long) for number in numbers]
            if not all(map(len, answers)):
                raise RuadaptError(f"an answer to {requests[numbers[0]][0][0][-80:]!r} is empty")
            self._refuse_what_does_not_fit(len(prompt), max(map(len, answers)))
            shared = len(commonprefix([before, prompt[:-1]]))  # noqa: RUF071 (ids, no paths)
            read.crop(shared - len(before))
            first = self._logits(prompt[shared:], read)
            before = prompt
            order = sorted(range(len(answers)), key=lambda place: len(answers[place]))
            size = max(1, LOGITS // (first.shape[-1] * len(answers[order[-1]])))
            for start in range(0, len(order), size):
                places = order[start : start + size]
                found = self._behind(first, read, [answers[place] for place in places])
                scores |= zip((numbers[place] for place in places), found, strict=True)
        return [scores[number] for number in range(len(requests))]

    def _behind(
        self, first: torch.Tensor, read: DynamicCache, answers: list[torch.Tensor]
    ) -> list[tuple[float, bool]]:
        """Score answers behind what the cache holds; `first` are the logits there, `(1, 1, rows)`."""
        logits = first.expand(len(answers), -1, -1)
        wanted = pad_sequence(answers, batch_first=True).to(self.device)
        if wanted.shape[1] > 1:  # what an answer is padded with lies behind it, and changes nothing
            branch = copy.deepcopy(read)
            branch.batch_repeat_interleave(len(answers))
            behind = self.model(input_ids=wanted[:, :-1], past_key_values=branch, use_cache=True).logits
            logits = torch.cat([logits, behind.float()], dim=1)
        spent = logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1).double()
        greedy = logits.argmax(-1) == wanted
        return [
            (float(cost[: len(answer)].sum()), bool(best[: len(answer)].all()))
            for cost, best, answer in zip(spent, greedy, answers, strict=True)
        ]

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer greedily until an end token, a stop string (`until`, left out), `max_gen_toks` tokens or
        the end of the model's positions."""
        prompts = [tuple(self.tok_encode(request.args[0])) for request in requests]
        starts = Counter(ids[:WORTH_SHARING] for ids in prompts)
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, (request, ids) in enumerate(zip(requests, prompts, strict=True)):
            self._refuse_what_does_not_fit(len(ids), 1)
            options, start = request.args[1], ids[:WORTH_SHARING]
            limit = min(options["max_gen_toks"], self.max_length - len(ids))
            family = start if starts[start] > self.batch_size // 8 else ()
            groups[tuple(options["until"]), limit, family].append(number)
        answers: dict[int, str] = {}
        for (until, limit, _), numbers in groups.items():
            numbers.sort(key=lambda number: (-len(prompts[number]), requests[number].args[0]))
            for first in range(0, len(numbers), self.batch_size):
                batch = numbers[first : first + self.batch_size]
                written = self._written([prompts[number] for number in batch], until, limit)
                for number, (text, ended) in zip(batch, written, strict=True):
                    answers[number] = text
                    if not ended:
                        self.cut.add(requests[number].args[0])
        return [answers[number] for number in range(len(requests))]

    def _written(
        self, prompts: Sequence[Ids], until: tuple[str, ...], limit: int
    ) -> Iterator[tuple[str, bool]]:
        """Yield what is written behind each prompt of a batch, and whether it ended before the limit.

        What all prompts begin with (the examples) is read once, which saves 7 seconds of the tasks above; the
        layout is `[beginning | padding | rest]`. Each answer stops for itself, where with `HFLM` a batch goes
        on until all of its answers hold the stop string.
        """
        shared = len(commonprefix([ids[:-1] for ids in prompts]))  # noqa: RUF071 (ids, no paths)
        options: dict[str, Any] = {}
        if len(prompts) > 1 and shared >= WORTH_SHARING:
            options["past_key_values"] = read = DynamicCache()
            self._logits(prompts[0][:shared], read)
            read.batch_repeat_interleave(len(prompts))
        beginning = torch.tensor(prompts[0][:shared], dtype=torch.long).expand(len(prompts), -1)
        rests = [torch.tensor(ids[shared:]) for ids in prompts]
        left: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
        mask = pad_sequence([torch.ones_like(rest) for rest in rests], **left)
        ids = torch.cat([beginning, pad_sequence(rests, **left)], dim=1).to(self.device)
        mask = torch.cat([torch.ones_like(beginning), mask], dim=1).to(self.device)
        ends, length = end_tokens(self.model, self.tokenizer), ids.shape[1]
        # Each token adds a byte at least, so that a string ends within as many tokens as it has bytes.
        longest = 1 + max((len(string.encode()) for string in until), default=0)

        def stopped(written: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            texts = self.tokenizer.batch_decode(written[:, max(length, written.shape[1] - longest) :])
            found = [any(string in text for string in until) for text in texts]
            return torch.tensor(found, device=self.device)

        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=ends,
            pad_token_id=ends[0],
            stopping_criteria=[stopped] if until else [],
            **options,
        )
        for row in output[:, length:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            text = self.tok_decode(row[:end])
            stops = [text.index(string) for string in until if string in text]
            yield text[: min(stops, default=None)], bool(stops) or end < len(row)

    def _logits(self, ids: Ids, read: DynamicCache) -> torch.Tensor:
        """Read ids behind what the cache holds; return the logits behind the last, `(1, 1, rows)`."""
        row = torch.tensor([ids], device=self.device)
        return self.model(
            input_ids=row, past_key_values=read, use_cache=True, logits_to_keep=1
        ).logits.float()

    def _refuse_what_does_not_fit(self, prompt: int, answer: int) -> None:
        if prompt + answer > self.max_length:
            raise RuadaptError(
                f"a prompt of {prompt} tokens and an answer of {answer} do not fit the model's "
                f"{self.max_length} positions; use fewer examples (shots) or shorter items"
            )
