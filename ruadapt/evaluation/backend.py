"""The harness's own `hf` backend, mended where it would ask or read something else than the task says."""

import logging
from collections import defaultdict
from functools import cache
from itertools import chain
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import generate, read_beginning
from ruadapt.evaluation.models import maximum_length, require_room
from ruadapt.training.encoding import LOGITS

Request = tuple[tuple[str, str], list[int], list[int]]
PROMPTS = 32
"""Prompts that are read together for their choices."""

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
        tasks: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            tasks[request.task_name].append(number)
        found: dict[int, tuple[float, bool]] = {}
        for numbers in tasks.values():
            part = super().loglikelihood([requests[number] for number in numbers], disable_tqdm)
            found |= dict(zip(numbers, part, strict=True))
        return [found[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return `(log p(answer | prompt), whether it is the greedy answer)` of each request.

        Each prompt is read once for all its choices, and what the prompts of a batch begin with (their
        examples) once for all of them. `HFLM` reads all of it for every choice: one base of the embedded
        pair then takes 34 seconds for the world's tasks instead of 10 (one thread).
        """
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, ((context, _), ids, wanted_ids) in enumerate(requests):
            if not wanted_ids:
                raise RuadaptError(f"an answer to {context[-80:]!r} is empty")
            asked[tuple(ids)].append(number)
        scores: dict[int, tuple[float, bool]] = {}
        # Minimal pairs have one prompt, the start of a text, and all of their sentences as its choices.
        rows = self.model.config.get_text_config().vocab_size
        most = max(1, LOGITS // (rows * max(len(ids) for _, _, ids in requests)))
        parts = [
            (prompt, numbers[first : first + most])
            for prompt, numbers in sorted(asked.items(), key=lambda part: len(part[0]))
            for first in range(0, len(numbers), most)
        ]
        size = max(1, min(PROMPTS, most // max(len(numbers) for _, numbers in parts)))
        for first in range(0, len(parts), size):
            prompts, numbers = zip(*parts[first : first + size], strict=True)
            answers = [torch.tensor(requests[number][2]) for part in numbers for number in part]
            require_room(self.model, max(map(len, prompts)), max(map(len, answers)))
            asked_ids, read = read_beginning(self.model, prompts)
            logits = self._logits(asked_ids, read, keep=1)
            wanted = pad_sequence(answers, batch_first=True)  # the padding lies behind, and changes nothing
            owners = torch.tensor([row for row, part in enumerate(numbers) for _ in part])
            if wanted.shape[1] > 1:
                read.batch_select_indices(owners.to(self.device))
                others = self._logits(torch.cat([asked_ids[owners], wanted[:, :-1]], dim=1), read)
                logits = torch.cat([logits[owners], others], dim=1)
            else:
                logits = logits[owners]
            wanted = wanted.to(logits.device)
            spent = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0].double()
            greedy = logits.argmax(-1) == wanted
            for row, (number, answer) in enumerate(zip(chain.from_iterable(numbers), answers, strict=True)):
                behind = slice(len(answer))
                scores[number] = float(spent[row, behind].sum()), bool(greedy[row, behind].all())
        return [scores[number] for number in range(len(requests))]

    def _logits(self, ids: torch.Tensor, read: DynamicCache, keep: int = 0) -> torch.Tensor:
        """Read ids `(batch, length)`, padding -1, behind those that the cache holds.

        Returns:
            The last `keep` logits (0: all that were read now), float32.
        """
        ids, known = ids.to(self.device), read.get_seq_length()
        mask = ids >= 0
        return self.model(
            input_ids=ids[:, known:].clamp(min=0),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, known:],
            past_key_values=read,
            use_cache=True,
            logits_to_keep=keep,
        ).logits.float()

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
