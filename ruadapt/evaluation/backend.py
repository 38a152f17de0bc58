"""The harness's own `hf` backend, mended where it would ask or read something else than the task says."""

import logging
from collections import defaultdict
from functools import cache
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import generate, read_beginning
from ruadapt.evaluation.models import maximum_length, require_room
from ruadapt.training.encoding import LOGITS

Request = tuple[tuple[str, str], list[int], list[int]]
ROWS = 128
"""Prompts with one of their choices that are read together."""

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of tasks and models that are built in code


class Backend(HFLM):
    """Log-likelihoods and greedy answers of one loaded model.

    What differs from `HFLM`: the cut between prompt and answer (`_encode_pair`); a prompt that does not fit
    the model's positions is an error, where `HFLM` drops its beginning; an answer ends at every end token of
    the model or its tokenizer; special tokens are never added; answers that the limit ended are known.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: answers per forward pass.
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
        shown = context.rstrip(" ")
        continuation = context[len(shown) :] + continuation
        before, whole = self.tok_encode(shown), self.tok_encode(shown + continuation)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, self.tok_encode(continuation)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Ask task by task: the prompts of one begin with the same examples."""
        found: dict[int, tuple[float, bool]] = {}
        for task in dict.fromkeys(request.task_name for request in requests):
            part = {number: each for number, each in enumerate(requests) if each.task_name == task}
            found |= zip(part, super().loglikelihood([*part.values()], disable_tqdm), strict=True)
        return [found[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return `(log p(answer | prompt), whether it is the greedy answer)` of each request.

        What the prompts of a batch begin with (their examples) is read once for all of them. `HFLM` reads it
        for every choice: a base of the embedded pair then takes 34 seconds for the world's tasks, not 14 (one
        thread).
        """
        for (context, _), _, answer in requests:
            if not answer:
                raise RuadaptError(f"an answer to {context[-80:]!r} is empty")
        longest = max(len(answer) for _, _, answer in requests)
        _, prompt, answer = max(requests, key=lambda request: len(request[1]) + len(request[2]))
        require_room(self.model, len(prompt), len(answer))
        size = LOGITS // (self.model.config.get_text_config().vocab_size * longest)
        size = max(1, min(ROWS, size))
        scores: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda number: sum(map(len, requests[number][1:])))
        for first in range(0, len(order), size):
            numbers = order[first : first + size]
            texts = [requests[number][1] + requests[number][2][:-1] for number in numbers]
            ids, read = read_beginning(self.model, texts, longest)
            ids, mask = ids.to(self.device), (ids >= 0).to(self.device)
            logits = self.model(
                input_ids=ids[:, read.get_seq_length() :].clamp(min=0),
                attention_mask=mask.long(),
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, read.get_seq_length() :],
                past_key_values=read,
                use_cache=True,
                logits_to_keep=longest,
            ).logits.float()
            for number, own in zip(numbers, logits, strict=True):
                wanted = torch.tensor(requests[number][2], device=self.device)
                shares = own[-len(wanted) :].log_softmax(-1)
                spent = shares.gather(-1, wanted[:, None]).double().sum()
                scores[number] = float(spent), bool((shares.argmax(-1) == wanted).all())
        return [scores[number] for number in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer greedily until an end token, a stop string (`until`, left out), `max_gen_toks` tokens or
        the end of the model's positions.

        Each answer stops for itself, where with `HFLM` a batch goes on until all of its answers hold the stop
        string.
        """
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):  # the prompts of a task have their examples in common
            until, limit = (request.args[1][name] for name in ("until", "max_gen_toks"))
            groups[request.task_name, tuple(until), limit].append(number)
        answers = [""] * len(requests)
        for (_, until, limit), numbers in groups.items():
            asked = [self.tok_encode(requests[number].args[0]) for number in numbers]
            options = {"max_tokens": limit, "batch_size": int(self.batch_size), "until": until}
            written = generate(self.model, self.tokenizer, asked, **options)
            for number, answer in zip(numbers, written, strict=True):
                answers[number] = answer.text
                if answer.cut:
                    self.cut.add(requests[number].args[0])
        return answers
