"""The harness's own `hf` backend, mended where it would ask or read something else than the task says."""

import copy
import logging
from collections import defaultdict
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
from ruadapt.training.generation import generate, maximum_length

Request = tuple[tuple[str, str], list[int], list[int]]
Ids = tuple[int, ...]

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

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer greedily until an end token, a stop string (`until`, left out), `max_gen_toks` tokens or
        the end of the model's positions.

        Each answer stops for itself, where with `HFLM` a batch goes on until all of its answers hold the stop
        string.
        """
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, (request, ids) in enumerate(zip(requests, prompts, strict=True)):
            self._refuse_what_does_not_fit(len(ids), 1)
            options = request.args[1]
            limit = min(options["max_gen_toks"], self.max_length - len(ids))
            groups[tuple(options["until"]), limit].append(number)
        ends, answers = end_tokens(self.model, self.tokenizer), [""] * len(requests)
        for (until, limit), numbers in groups.items():
            numbers.sort(key=lambda number: (-len(prompts[number]), requests[number].args[0]))
            written = generate(
                self.model,
                [prompts[number] for number in numbers],
                ends,
                max_new_tokens=limit,
                batch_size=int(self.batch_size),
                until=until,
                tokenizer=self.tokenizer,
            )
            for number, ids in zip(numbers, written, strict=True):
                ended = ids[-1] in ends
                text = self.tok_decode(ids[:-1] if ended else ids)
                stops = [text.index(string) for string in until if string in text]
                answers[number] = text[: min(stops, default=None)]
                if not ended and not stops:
                    self.cut.add(requests[number].args[0])
        return answers

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
