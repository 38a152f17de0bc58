"""Vocabularies: replaced, extended, optimised, mapped onto each other, measured and saved."""

from ruadapt.vocab.certify import certify, render_certificate
from ruadapt.vocab.donor import read_donor
from ruadapt.vocab.extend import extend, reachable, truncate
from ruadapt.vocab.mapping import conversion_matrix, mapping_log, overlap
from ruadapt.vocab.measure import (
    DEFAULT_MEASURES,
    OTHER_MEASURES,
    boundary_agreement,
    characters_per_token,
    compare,
    composition,
    measure,
    reference_folder,
    round_trips,
    row_cost,
    row_report,
    same_ids,
    whole_words,
)
from ruadapt.vocab.prune import optimize
from ruadapt.vocab.save import check_folder, save_tokenizer
from ruadapt.vocab.spec import fetch_tokenizer, load_tokenizer, rows, special_ids
from ruadapt.vocab.surface import pieces, script, token_bytes
from ruadapt.vocab.train import train_replacement

__all__ = [
    "DEFAULT_MEASURES",
    "OTHER_MEASURES",
    "boundary_agreement",
    "certify",
    "characters_per_token",
    "check_folder",
    "compare",
    "composition",
    "conversion_matrix",
    "extend",
    "fetch_tokenizer",
    "load_tokenizer",
    "mapping_log",
    "measure",
    "optimize",
    "overlap",
    "pieces",
    "reachable",
    "read_donor",
    "reference_folder",
    "render_certificate",
    "round_trips",
    "row_cost",
    "row_report",
    "rows",
    "same_ids",
    "save_tokenizer",
    "script",
    "special_ids",
    "token_bytes",
    "train_replacement",
    "truncate",
    "whole_words",
]
