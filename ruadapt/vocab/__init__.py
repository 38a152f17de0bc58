"""Vocabularies: replaced, extended, optimised, mapped onto each other, measured and saved."""

from ruadapt.vocab.extend import extend, optimize, reachable
from ruadapt.vocab.mapping import conversion_matrix, overlap
from ruadapt.vocab.measure import (
    characters_per_token,
    compare,
    composition,
    measure,
    reference_folder,
    round_trips,
    row_report,
    same_ids,
    whole_words,
)
from ruadapt.vocab.save import check_folder, save_tokenizer
from ruadapt.vocab.spec import fetch_tokenizer, load_tokenizer, rows, special_ids
from ruadapt.vocab.surface import pieces, script, token_bytes
from ruadapt.vocab.train import train_replacement

__all__ = [
    "characters_per_token",
    "check_folder",
    "compare",
    "composition",
    "conversion_matrix",
    "extend",
    "fetch_tokenizer",
    "load_tokenizer",
    "measure",
    "optimize",
    "overlap",
    "pieces",
    "reachable",
    "reference_folder",
    "round_trips",
    "row_report",
    "rows",
    "same_ids",
    "save_tokenizer",
    "script",
    "special_ids",
    "token_bytes",
    "train_replacement",
    "whole_words",
]
