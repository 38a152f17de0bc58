"""Learned Embedding Propagation on model folders: three in, one instruct model of the new vocabulary out."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ruadapt import lep
from ruadapt.checkpoints.bodies import AdaptedBody, carry
from ruadapt.checkpoints.model_folders import (
    read_embeddings,
    read_layout,
    read_matrix,
    require_rows,
    tying,
    write_rows,
)
from ruadapt.errors import RuadaptError
from ruadapt.vocab import conversion_matrix, load_tokenizer, overlap, script, token_bytes

# Fine-tuned pairs have a mean cosine of base and instruct rows near 0.99, strangers near 0.
STRANGERS_COSINE = 0.5
# Ids that name another token in the instruct model's tokenizer than in the base's, as a share of all.
STRANGERS_IDS = 0.01
# How much nearer an adapted row is to its own token's old row than to another's: 0 with a wrong tokenizer.
OWN_ROWS_MARGIN = 0.1
# Tokens that are looked at for it.
OWN_ROWS = 10_000
# Scripts that a report names; the rarer ones are "Other".
SCRIPTS = 6


def propagate(
    base: Path,
    instruct: Path,
    adapted: Path,
    target: Path,
    method: str,
    *,
    options: lep.Options | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    body_scale: float = 1.0,
    adapted_body: AdaptedBody | None = None,
    link: bool = False,
    device: str = "cpu",
    seconds: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Write the instruct model with the adapted base's vocabulary: LEP, METHOD section 5.

    The body is the instruct model's with the change that training made to the base's, `bodies.carry`; bit for
    bit its own where the base's was left as it is. Rows of its special and added tokens are its own. Where
    base and instruct differ in height, the rows that both have are used; what the instruct model adds belongs
    to its added tokens.

    Args:
        method: a name in `lep.METHODS`, or `lep.AUTO`: each matrix's best on held-out tokens.
        options: strength, weights and norm correction.
        tokenizer: folder of the tokenizer that the adapted model is meant to have; checked when given.
        force: propagate although base and instruct look like strangers, or the adapted rows like another
            vocabulary's.
        body_scale: α, the share of the body's change that is made; 0 leaves the instruct model's body.
        adapted_body: where the adapted body is, if `adapted` holds embeddings alone.
        link: see `write_rows`.
        device: where matrices are multiplied and solved ("cpu", "cuda"); it needs float64.
        seconds: is given what fit, report and rows took.

    Returns:
        `lep.fit_report` for `input` and, where it is untied, `head`, with `why` (of `lep.AUTO`, else null)
        and `norms`, quantiles of the row norms of the four matrices; and for `body` the report of
        `bodies.carry`.

    Raises:
        RuadaptError: the three models do not belong together, or one is unreadable; nothing is written then.
    """
    lep.require_known(method, lep.AUTO)
    options = options or lep.Options()
    folders = {"base": Path(base), "instruct": Path(instruct), "adapted": Path(adapted)}
    forms = {name: _form(folder) for name, folder in folders.items()}
    _require_agreement(forms)
    base_tokenizer, instruct_tokenizer, adapted_tokenizer = map(load_tokenizer, folders.values())
    if tokenizer is not None and load_tokenizer(tokenizer).get_vocab() != adapted_tokenizer.get_vocab():
        raise RuadaptError(f"{adapted} was adapted with another tokenizer than {tokenizer}")
    for name, own in zip(folders, (base_tokenizer, instruct_tokenizer, adapted_tokenizer), strict=True):
        require_rows(folders[name], own, forms[name].rows)
    moved = _drift(folders, forms)
    if not force:
        _require_pair(base, instruct, moved, base_tokenizer, instruct_tokenizer)

    common, new_rows = _common(forms), forms["adapted"].rows
    transfer = _transfer(adapted_tokenizer, base_tokenizer, common, new_rows)
    overlap_new, overlap_old = overlap(adapted_tokenizer, base_tokenizer)
    copied_new, copied_old = _copied(instruct, instruct_tokenizer, adapted_tokenizer)
    fit_mask = torch.zeros(new_rows, dtype=torch.bool)
    fit_mask[transfer.indices()[0]] = True
    fit_mask[copied_new] = False
    pieces, groups = _pieces(base_tokenizer, common), token_groups(base_tokenizer, common)

    def inputs(role: str) -> lep.LepInputs:
        old, new, trained = (read_matrix(folder, role) for folder in folders.values())
        return lep.LepInputs(
            base=old[:common],
            instruct=new[:common],
            adapted=trained,
            transfer=transfer,
            overlap_new=overlap_new,
            overlap_old=overlap_old,
            fit_mask=fit_mask,
            ordinary=groups["kind"][1] >= 0,
            copied_new=copied_new,
            copied_rows=new[copied_old],
            device=device,
        )

    maps: dict[str, _Map] = {}
    for role in moved:
        if not force:
            _require_own_rows(adapted, inputs(role))
        load = partial(inputs, role)
        maps[role] = _Map(
            load, method, options, pieces, groups, moved[role], {} if seconds is None else seconds
        )
    body, body_report = carry(
        read_layout(base),
        adapted_body or AdaptedBody(read_layout(adapted)),
        read_layout(instruct),
        body_scale,
    )
    write_rows(
        instruct,
        target,
        new_rows,
        {role: found.rows for role, found in maps.items()},
        adapted,
        body=body,
        link=link,
        tokenizers=(instruct_tokenizer, adapted_tokenizer),
    )
    return {role: found.report for role, found in maps.items()} | {"body": body_report}


@dataclass
class _Map:
    """One matrix's map: fitted when the first rows are asked for, while the model's body is being copied.

    With the last rows its matrices are let go, and the report is there.
    """

    load: Callable[[], lep.LepInputs]
    method: str
    options: lep.Options
    pieces: Tensor
    groups: lep.Groups
    drift: dict[str, float]
    seconds: dict[str, float]
    norms: list[Tensor] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - started

    @cached_property
    def inputs(self) -> lep.LepInputs:
        return self.load()

    @cached_property
    def fitted(self) -> lep.Fit:
        with self._timed("fit"):
            fitter = lep.Fitter(self.inputs, self.options)
            chosen, why = lep.choose(fitter, self.pieces) if self.method == lep.AUTO else (self.method, None)
            fit = fitter.fit(chosen)
        with self._timed("report"):
            report = lep.fit_report(fitter, chosen, fit, self.pieces, self.groups, self.drift)
            self.report = report | {"why": why}
        return fit

    def rows(self, first: int, last: int) -> Tensor:
        fit, corrected = self.fitted, self.options.norm_correction
        with self._timed("rows"):
            rows = lep.propagate(fit, self.inputs, norm_correction=corrected, part=slice(first, last))
            self.norms.append(lep.norms(rows))
        if last == len(self.inputs.adapted):
            self._finish()
        return rows

    def _finish(self) -> None:
        matrices = {name: getattr(self.inputs, name) for name in ("base", "instruct", "adapted")}
        lengths = {name: lep.norms(matrix) for name, matrix in matrices.items()}
        lengths["propagated"] = torch.cat(self.norms)
        self.report["norms"] = {name: lep.norm_quantiles(found) for name, found in lengths.items()}
        del self.inputs, self.fitted


@dataclass(frozen=True)
class _Form:
    rows: int
    width: int
    tied: bool

    @property
    def roles(self) -> list[str]:
        return ["input"] if self.tied else ["input", "head"]


def _form(folder: Path) -> _Form:
    embeddings = read_embeddings(folder)
    rows, width = embeddings.input.shape
    return _Form(rows, width, embeddings.tied)


def drift(base: Path, instruct: Path) -> dict[str, dict[str, float]]:
    """Say how far the instruct model's rows moved from the base's: `lep.compare` of input and untied head.

    Raises:
        RuadaptError: a folder is unreadable, or hidden sizes or tying differ.
    """
    folders = {"base": Path(base), "instruct": Path(instruct)}
    forms = {name: _form(folder) for name, folder in folders.items()}
    _require_agreement(forms)
    return _drift(folders, forms)


def _drift(folders: Mapping[str, Path], forms: Mapping[str, _Form]) -> dict[str, dict[str, float]]:
    rows = slice(_common(forms))
    return {
        role: lep.compare(*(read_matrix(folders[name], role)[rows] for name in ("base", "instruct")))
        for role in forms["base"].roles
    }


def _common(forms: Mapping[str, _Form]) -> int:
    return min(forms["base"].rows, forms["instruct"].rows)


def _require_agreement(forms: Mapping[str, _Form]) -> None:
    for what, values in (
        ("hidden size", {name: form.width for name, form in forms.items()}),
        ("tying of the head", {name: tying(form.tied) for name, form in forms.items()}),
    ):
        if len(set(values.values())) > 1:
            found = ", ".join(f"{name} {value}" for name, value in values.items())
            raise RuadaptError(f"the models differ in {what}: {found}; LEP needs models of one architecture")


def _require_pair(
    base: Path,
    instruct: Path,
    drift: dict[str, dict[str, float]],
    base_tokenizer: Tokenizer,
    instruct_tokenizer: Tokenizer,
) -> None:
    ids, theirs = base_tokenizer.get_vocab(), instruct_tokenizer.get_vocab()
    moved = sum(theirs.get(token, number) != number for token, number in ids.items())
    if moved > STRANGERS_IDS * len(ids):
        raise RuadaptError(
            f"{instruct} gives {moved} of {len(ids)} tokens other ids than {base}: "
            "it is not tuned from this base; use force to go on"
        )
    for name, values in drift.items():
        if values["mean_cosine"] < STRANGERS_COSINE:
            raise RuadaptError(
                f"{instruct} is not tuned from {base}: the mean cosine of their {name} rows is "
                f"{values['mean_cosine']:.2f}, under {STRANGERS_COSINE} (tuned models have about 0.99); "
                "use force to go on"
            )


def _require_own_rows(adapted: Path, inputs: lep.LepInputs) -> None:
    """Refuse an adapted model whose rows do not follow its tokenizer's tokens."""
    some = slice(None, None, max(1, len(inputs.overlap_old) // OWN_ROWS))
    old = inputs.base[inputs.overlap_old[some]]
    new = inputs.adapted[inputs.overlap_new[some]]
    own, another = (lep.compare(old, rows)["mean_cosine"] for rows in (new, new.roll(1, dims=0)))
    if len(old) > 1 and own - another < OWN_ROWS_MARGIN:
        raise RuadaptError(
            f"{adapted}: rows of shared tokens resemble the base's rows of the same tokens no more "
            f"(cosine {own:.2f}) than those of others ({another:.2f}): the model was adapted with another "
            "tokenizer; use force to go on"
        )


def _transfer(new: Tokenizer, old: Tokenizer, old_rows: int, rows: int) -> Tensor:
    """T, `[rows, old_rows]`; rows beyond the new tokenizer's ids (padding) are empty."""
    matrix = conversion_matrix(new, old, old_rows=old_rows)
    shape = (rows, old_rows)
    return torch.sparse_coo_tensor(matrix.indices(), matrix.values(), shape, check_invariants=True).coalesce()


def _copied(folder: Path, instruct: Tokenizer, adapted: Tokenizer) -> tuple[Tensor, Tensor]:
    """New and old ids of the instruct tokenizer's added tokens.

    Raises:
        RuadaptError: the adapted vocabulary lost a special token: chat could not work.
    """
    pairs = []
    for old_id, token in instruct.get_added_tokens_decoder().items():
        new_id = adapted.token_to_id(token.content)
        if new_id is not None:
            pairs.append((new_id, old_id))
        elif token.special:
            raise RuadaptError(
                f"the adapted vocabulary lacks {token.content!r}, a special token of {folder}; "
                "build the new vocabulary from the instruct model's tokenizer"
            )
    ids = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return ids[:, 0], ids[:, 1]


def _pieces(tokenizer: Tokenizer, rows: int) -> Tensor:
    """Sparse `[rows, rows]` halves: the two tokens that a BPE merge makes a third of; none without merges."""
    vocabulary = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"].get("merges", [])
    made: dict[int, tuple[int, int]] = {}
    for left, right in merges:
        made.setdefault(vocabulary[left + right], (vocabulary[left], vocabulary[right]))
    indices = [(token, part) for token, parts in made.items() for part in parts]
    return torch.sparse_coo_tensor(
        torch.tensor(indices, dtype=torch.long).reshape(-1, 2).T,
        torch.full((len(indices),), 0.5, dtype=torch.float64),
        (rows, rows),
        check_invariants=True,
    ).coalesce()


def token_groups(tokenizer: Tokenizer, rows: int) -> dict[str, tuple[list[str], Tensor]]:
    """Label old tokens for a report: by script, quarter of the ids (roughly of frequency, as they are merged
    in that order) and kind; −1 for special tokens and for rows, up to `rows`, that have no token.
    """
    surfaces = [*token_bytes(tokenizer)[:rows], *[None] * rows][:rows]
    scripts = ["" if surface is None else script(surface) for surface in surfaces]
    common = [name for name, _ in Counter(filter(None, scripts)).most_common(SCRIPTS)]
    place = {"": -1} | {name: number for number, name in enumerate(common)}
    kinds = ["word start", "inner piece", "other"]
    texts = ["" if surface is None else surface.decode(errors="replace") for surface in surfaces]
    kind = [(0 if text[0] == " " else 1) if text.strip(" ").isalpha() else 2 for text in texts if text]
    ordinary = torch.tensor([bool(text) for text in texts])
    labels = torch.full((rows,), -1).masked_scatter(ordinary, torch.tensor(kind, dtype=torch.int64))
    quarters = torch.where(ordinary, torch.arange(rows) * 4 // rows, -1)
    return {
        "script": ([*common, "Other"], torch.tensor([place.get(name, len(common)) for name in scripts])),
        "frequency": (["first quarter", "second quarter", "third quarter", "last quarter"], quarters),
        "kind": (kinds, labels),
    }
