"""The losses of a training: the next token's, and the distance to a teacher's hidden states.

4,096 tokens of a 262,144-row vocabulary make 4.3 GB of float32 logits, and the plain loss holds four such
matrices. trl's head takes them in tiles of 4,096 tokens and 32,768 rows, and computes each twice. On a CPU
the loss then takes twice the time (1,024 tokens, 60,000 rows, width 512, one thread: 7.8 against 4.0
seconds), so it is used where logits are many.

Hidden-state distillation tells what a new token should mean to the model that reads on. Where a token ends at
the same byte as one of the teacher's, which reads the same text by its own vocabulary, the trained model's
hidden states are held to the teacher's. The idea is that of token distillation (Dobler et al., 2025), here as
a second loss of continued pre-training and calibration.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ruadapt import vocab
from ruadapt.training.encoding import IGNORED, collate
from ruadapt.training.parallel import KEPT
from ruadapt.training.trainable import attention, without_adapters

MUCH_LOGITS = 1 << 30
"""Bytes of float32 logits from which they are not held at once."""
TILE = 64
"""The head reads tokens by this multiple: the CPU's kernels are made anew for every shape."""
NOT_SHARED = -1
KEPT_BYTES = 500_000_000
"""States that one process leaves there."""


@contextmanager
def only_counted(head: torch.nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """Let a model's head read only the tokens whose next one carries loss: in chats half of them do not.

    The loss is the same: `inputs` get `shift_labels`, which transformers takes as they are.

    Args:
        inputs: of the model, `labels` int64 [batch, tokens] among them.
    """
    following = pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    places = (following != IGNORED).nonzero()[:, 0]
    padding = (0, -len(places) % TILE)
    inputs["shift_labels"] = pad(following[places], padding, value=IGNORED)[None]
    places = pad(places, padding)
    hook = head.register_forward_pre_hook(lambda _, read: read[0].flatten(0, 1)[places][None])
    try:
        yield
    finally:
        hook.remove()


def fuse_head(network: Any, tokens: int) -> bool:
    """Give a model trl's fused head if the logits of `tokens` are many, and say whether it got it.

    It is used where the model is called with `fused_lm_head=True` and labels; then there are no logits.
    """
    model = without_adapters(network)
    many = 4 * tokens * len(model.get_output_embeddings().weight) > MUCH_LOGITS
    if many:
        from trl.trainer import add_fused_lm_head  # takes seconds, and most trainings go without it

        add_fused_lm_head(model)
    return many


def states_loss(hidden: torch.Tensor, teacher_hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return Σ|h − t|² / Σ|t|² over the tokens that end where one of the teacher's ends.

    Args:
        hidden: hidden states h of the trained model, float [batch, tokens or more, d].
        teacher_hidden: the teacher's states t, float [batch, teacher's tokens, d].
        positions: int64 [batch, tokens]; for each token the teacher's token that ends at the same byte, or
            NOT_SHARED.
    """
    shared, hidden = positions != NOT_SHARED, hidden[:, : positions.shape[1]]
    places = positions.clamp(min=0)[..., None].expand(-1, -1, teacher_hidden.shape[-1])
    target = teacher_hidden.gather(1, places)[shared].float()
    difference = hidden[shared].float() - target
    return difference.square().sum() / target.square().sum()


def shared_ends(left: np.ndarray, teacher_left: np.ndarray) -> np.ndarray:
    """Return for each token the position of the teacher's token that ends at the same byte, or NOT_SHARED.

    Args:
        left, teacher_left: bytes of the text behind each token of two tokenizations, int64 [tokens], falling.
            They are counted from the end, because a tokenizer may put a space before a text's beginning.
    """
    # `searchsorted` wants rising numbers.
    found = np.minimum(np.searchsorted(-teacher_left, -left), len(teacher_left) - 1)
    return np.where(teacher_left[found] == left, found, NOT_SHARED)


class Teacher:
    """The model of a folder, which is read and never trained, beside a student with another tokenizer."""

    def __init__(self, folder: Path, student: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention())
        self.network = network.eval().requires_grad_(False)
        self._name, self._kept = f"{folder} {dtype}", 0
        self._bytes, self._teacher_bytes = _token_bytes(student), _token_bytes(self.tokenizer)

    def read(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return what the teacher reads where a student reads the `input_ids` of rows.

        Returns:
            `teacher_ids`, int64 [batch, teacher's tokens], NOT_SHARED behind a row's end, and
            `teacher_positions`, int64 [batch, tokens], as `states_loss` wants them.
        """
        surfaces = [[self._bytes[number] for number in row["input_ids"]] for row in rows]
        # A block of packed text may begin and end inside a character.
        joined = [b"".join(row) for row in surfaces]
        begins = [next((at for at, byte in enumerate(row[:4]) if byte & 0xC0 != 0x80), 0) for row in joined]
        texts = [row[at:].decode(errors="ignore") for row, at in zip(joined, begins, strict=True)]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        positions = []
        for row, begin, text, ids in zip(surfaces, begins, texts, encoded, strict=True):
            left = begin + len(text.encode()) - np.cumsum([len(surface) for surface in row])
            teacher_ends = np.cumsum([len(self._teacher_bytes[number]) for number in ids])
            positions.append(torch.from_numpy(shared_ends(left, teacher_ends[-1] - teacher_ends)))
        columns = {"teacher_ids": list(map(torch.tensor, encoded)), "teacher_positions": positions}
        return {name: pad_sequence(rows, True, NOT_SHARED) for name, rows in columns.items()}

    def loss(self, hidden: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return `states_loss` of a student's last hidden states `hidden` for what `read` returned."""
        self.network.to(ids.device)
        states = self._states([row[row != NOT_SHARED] for row in ids])
        return states_loss(hidden, pad_sequence(states, batch_first=True), positions)

    def _states(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the states `[tokens, d]` of rows: every epoch, every seed and each process reads the same.

        What a row gets does not depend on the rows beside it, so neither on what was kept before.
        """
        folder, dtype = os.environ.get(KEPT), self.network.dtype
        names = [hashlib.sha256(self._name.encode() + row.cpu().numpy().tobytes()) for row in rows]
        files = [Path(folder or "", name.hexdigest()) for name in names]
        missing = [place for place, file in enumerate(files) if not (folder and file.exists())]
        found: dict[int, torch.Tensor] = {}
        if missing:
            together = collate([{"input_ids": rows[place]} for place in missing])["input_ids"]
            with torch.no_grad():
                read = self.network.base_model(together, use_cache=False).last_hidden_state
            found = {place: row[: len(rows[place])] for place, row in zip(missing, read, strict=True)}
        for place, states in found.items():
            if folder and self._kept + states.nbytes <= KEPT_BYTES:
                self._kept += states.nbytes
                part = files[place].with_suffix(f".{os.getpid()}")
                states.cpu().view(torch.uint8).numpy().tofile(part)
                part.replace(files[place])
        for place in range(len(rows)):
            if place not in found:
                kept = torch.from_numpy(np.fromfile(files[place], np.uint8)).view(dtype)
                found[place] = kept.view(len(rows[place]), -1).to(rows[place].device)
        return [found[place] for place in range(len(rows))]


def _token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes that each id stands for in a text; special tokens stand for their names."""
    known = vocab.token_bytes(tokenizer.backend_tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(range(len(known))))
    return [
        (name or "").encode() if surface is None else surface
        for surface, name in zip(known, names, strict=True)
    ]
