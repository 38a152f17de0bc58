"""The second loss of training: its value, the tokens that it stands on, and that a teacher holds a model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENGLISH, RUSSIAN, TinyPair
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruadapt import checkpoints, vocab
from ruadapt.errors import RuadaptError
from ruadapt.files import write_jsonl
from ruadapt.pipeline.adaptation import calibrate
from ruadapt.training import losses
from ruadapt.training.encoding import collate, pack
from ruadapt.training.losses import NOT_SHARED, Teacher, shared_ends, states_loss
from ruadapt.training.trainable import TrainingOptions
from ruadapt.training.trainer import fit

TEXT = "Пекарь 🦊 живёт у реки, the baker — «opens» her shop.\n\tВ 1987 году…"
TEXTS = (RUSSIAN + "\n" + ENGLISH).splitlines() * 6
OPTIONS = TrainingOptions(steps=30, batch_size=4, learning_rate=3e-3, seed=3)


@pytest.fixture(scope="module")
def student(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with 60 new rows."""
    folder = tmp_path_factory.mktemp("student")
    new = vocab.extend(tiny_pair.base, RUSSIAN.splitlines() * 40, added_rows=60)
    vocab.save_tokenizer(folder / "tokenizer", new, tiny_pair.base)
    checkpoints.initialise(tiny_pair.base, folder / "tokenizer", folder / "model")
    return folder / "model"


def test_the_loss_is_the_relative_square_of_shared_states() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 4, generator=generator)
    teacher = torch.randn(2, 5, 4, generator=generator)
    positions = torch.tensor([[0, NOT_SHARED, 4], [NOT_SHARED, 2, 3]])
    above = below = 0.0
    for row, column, place in [(0, 0, 0), (0, 2, 4), (1, 1, 2), (1, 2, 3)]:
        h, t = hidden[row, column].double(), teacher[row, place].double()
        above, below = above + float((h - t).square().sum()), below + float(t.square().sum())
    assert float(states_loss(hidden, teacher, positions)) == pytest.approx(above / below, rel=1e-6)


def test_ends_are_matched_from_the_end_of_the_text() -> None:
    # " ab|c|de" against "a|bc|d|e": the first text has a space more in front.
    assert shared_ends(np.array([3, 2, 0]), np.array([4, 2, 1, 0])).tolist() == [NOT_SHARED, 1, 3]


@pytest.mark.parametrize("size", [5, 16, 40])
def test_the_teacher_reads_the_same_text_and_shares_equal_ends(
    size: int, student: Path, tiny_pair: TinyPair
) -> None:
    new, old = AutoTokenizer.from_pretrained(student), AutoTokenizer.from_pretrained(tiny_pair.base)
    teacher = Teacher(tiny_pair.base, new, torch.float32)
    blocks = list(pack([TEXT, *RUSSIAN.splitlines()], new, size))
    rows, read = [list(block["input_ids"]) for block in blocks], teacher.read(blocks)
    whole, parts = vocab.token_bytes(old.backend_tokenizer), vocab.token_bytes(new.backend_tokenizer)
    shared = 0
    for row, ids, positions in zip(rows, read["teacher_ids"], read["teacher_positions"], strict=True):
        said = [b"<|endoftext|>" if parts[number] is None else parts[number] for number in row]
        theirs = [b"<|endoftext|>" if whole[number] is None else whole[number] for number in ids.tolist()]
        for place, position in enumerate(positions.tolist()):
            if position != NOT_SHARED:
                mine, its = b"".join(said[: place + 1]), b"".join(theirs[: position + 1])  # type: ignore[arg-type]
                # A block may begin inside a character, which the teacher does not see.
                assert mine.endswith(its) and len(mine) - len(its) < 4
                shared += 1
    assert shared > 0.9 * sum(map(len, rows))


@pytest.mark.parametrize("chunked", [False, True])
def test_training_is_held_to_the_teacher(
    chunked: bool, student: Path, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(losses, "MUCH_LOGITS", 0)
    tokenizer = AutoTokenizer.from_pretrained(student)
    blocks = pack(TEXTS, tokenizer, 32)
    teacher = Teacher(tiny_pair.base, tokenizer, torch.float32)
    first = list(blocks)[:20]
    batch = collate(first) | teacher.read(first)

    def distance(folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            hidden = model.base_model(batch["input_ids"]).last_hidden_state
        return float(teacher.loss(hidden, batch["teacher_ids"], batch["teacher_positions"]))

    for weight in (0.0, 5.0):
        options = replace(OPTIONS, hidden_state_weight=weight)
        fit(student, blocks, tmp_path / str(weight), options, teacher=tiny_pair.base)
    assert distance(tmp_path / "5.0") < 0.3 * distance(tmp_path / "0.0")


def test_a_model_is_its_own_teacher_at_no_distance(tiny_pair: TinyPair, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Кто старше?"}, {"role": "assistant", "content": "Моряк 🦊."}]
    chats, losses = tmp_path / "chat.jsonl", []
    write_jsonl(chats, [{"messages": messages}, {"messages": messages + messages}])
    for weight in (0.0, 9.0):
        # The teacher's weights would be bfloat16, the student's products alone.
        options = {"steps": 1, "batch_size": 2, "hidden_state_weight": weight, "bf16": False}
        instruct, target = tiny_pair.instruct, tmp_path / str(weight)
        report = calibrate(instruct, target, [chats], None, 0.0, options, original=instruct)
        losses.append(report["loss"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_padding_shares_nothing(tiny_pair: TinyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.base)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(["Anna", TEXT])["input_ids"]]
    read = Teacher(tiny_pair.base, tokenizer, torch.float32).read(rows)
    positions = read["teacher_positions"]
    assert positions.shape[1] <= collate(rows)["input_ids"].shape[1]
    assert (positions >= 0).sum(1).tolist() == [len(row["input_ids"]) for row in rows]


def test_a_row_is_read_once_by_all_processes_whatever_stands_beside_it(
    student: Path, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    rows = list(pack(TEXTS, tokenizer, 16))[:6]
    asked: list[int] = []

    def losses_of(teacher: Teacher) -> list[float]:
        asked.clear()
        teacher.network.base_model.register_forward_hook(lambda *call: asked.append(len(call[1][0])))
        found = []
        for batch in (rows[:2], rows[2:], rows[1:4]):
            read = teacher.read(batch)
            hidden = torch.ones(len(batch), 16, teacher.network.config.hidden_size)
            found.append(float(teacher.loss(hidden, read["teacher_ids"], read["teacher_positions"])))
        return found

    def teacher(dtype: torch.dtype) -> Teacher:
        return Teacher(tiny_pair.base, tokenizer, dtype)

    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.delenv(losses.KEPT, raising=False)
        first = losses_of(teacher(dtype))
        assert asked == [2, 4, 3]
        monkeypatch.setenv(losses.KEPT, str(tmp_path))
        assert losses_of(teacher(dtype)) == first
        assert asked == [2, 4]
        assert losses_of(teacher(dtype)) == first  # as another process would
        assert not asked
    whole = first
    # With room for the states of two rows the losses are the same.
    small = tmp_path / "small"
    monkeypatch.setenv(losses.KEPT, str(small))
    room = 2 * max(file.stat().st_size for file in tmp_path.iterdir())
    small.mkdir()
    monkeypatch.setattr(losses, "KEPT_BYTES", room)
    assert losses_of(teacher(torch.bfloat16)) == whole
    assert 0 < sum(file.stat().st_size for file in small.iterdir()) <= room
    assert losses_of(teacher(torch.bfloat16)) == whole
    assert asked


def test_a_weight_without_a_teacher_is_refused(tiny_pair: TinyPair, tmp_path: Path) -> None:
    blocks = pack(TEXTS, AutoTokenizer.from_pretrained(tiny_pair.base), 32)
    options = replace(OPTIONS, hidden_state_weight=1.0)
    with pytest.raises(RuadaptError, match="teacher"):
        fit(tiny_pair.base, blocks, tmp_path / "out", options)
