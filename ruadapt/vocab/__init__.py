"""Vocabularies: replaced, extended, optimised, mapped onto each other, measured, certified and saved."""

from ruadapt.vocab.certify import broken, certify, changed_ids, changed_texts
from ruadapt.vocab.extend import extend, reachable
from ruadapt.vocab.mapping import conversion_matrix, old_pieces, shared_specials, shared_tokens
from ruadapt.vocab.measure import agreement, compare, composition, measure, row_report
from ruadapt.vocab.prune import optimize
from ruadapt.vocab.save import check_folder, load_as_transformers, require_tokens, save_tokenizer
from ruadapt.vocab.spec import fetch_tokenizer, load_tokenizer, rows, special_ids
from ruadapt.vocab.surface import pieces, script, token_bytes
from ruadapt.vocab.train import joined_numbers, train_replacement
from ruadapt.vocab.words import read_donor
