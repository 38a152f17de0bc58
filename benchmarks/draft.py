"""How often a draft model is right about its target's next token, before and after both are adapted.

    python -m benchmarks.draft TARGET DRAFT TEXT [CHARACTERS]

Both read the same held-out text in the target's ids. A token that the draft puts first where the target puts
it first would be accepted by greedy speculative decoding. Where the vocabularies differ, the draft sees ids
that mean other tokens to it, as an engine without a check would feed it.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ruadapt.data_sets import read_texts
from ruadapt.evaluation.models import embedding_rows, load, maximum_length
from ruadapt.files import take_characters
from ruadapt.training.encoding import start_token
from ruadapt.vocab import agreement, load_tokenizer


def acceptance(target: Path, draft: Path, texts: list[str]) -> dict[str, float]:
    """Return the share of accepted tokens, and what the vocabularies share."""
    (model, tokenizer), (small, _) = load(target, "cpu"), load(draft, "cpu")
    accepted = total = 0
    for text in texts:
        ids = [start_token(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
        row = torch.tensor([ids[: maximum_length(model)]])
        accepted += int((_first(model, row) == _first(small, row)).sum())
        total += row.shape[1]
    shared = agreement(load_tokenizer(target), load_tokenizer(draft), texts)
    return {"acceptance": accepted / total, "tokens": total, **shared}


@torch.inference_mode()
def _first(model: PreTrainedModel, row: torch.Tensor) -> torch.Tensor:
    """Return the token that comes first behind each of a row; ids that a draft lacks are its last row."""
    return model(input_ids=row.clamp(max=embedding_rows(model) - 1)).logits.argmax(-1)


if __name__ == "__main__":
    target, draft, text = map(Path, sys.argv[1:4])
    limit = int(sys.argv[4]) if len(sys.argv) > 4 else 20_000
    found = acceptance(target, draft, list(take_characters(read_texts(text), limit)))
    print(json.dumps({"target": target.name, "draft": draft.name, **found}))
