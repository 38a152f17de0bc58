"""Fixtures: a tiny random model pair (tied and untied) and the folder of real reference tokenizers."""

import os

# Set before any library reads them: no network, one thread a process, no fork warnings.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

SPECIAL_TOKENS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Qwen2-like words, with digits one by one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENGLISH = """The baker lives in a small town by the river and opens her shop at six in the morning.
Her brother works as a teacher; his pupils are seven years old and they like to read about animals.
Where does the teacher live? The teacher lives in the old house behind the market.
In 1987 the doctor bought a dog, a grey cat and three white horses from his neighbour.
Who is older, the sailor or the gardener? The sailor is older than the gardener by 12 years.
Yesterday it rained all day, so the children stayed at home and listened to their grandmother's stories.
The mother of the painter is a writer. The writer has written twenty books about the northern sea.
Copy this sentence exactly: the fisherman found 25 green bottles under the wooden bridge.
Summarise the text in one sentence. The gardener planted apple trees, and in autumn he sold the apples.
They don't know the answer, but we'll ask the old captain; he's seen every harbour in the world."""
RUSSIAN = """Пекарь живёт в маленьком городе у реки и открывает свою лавку в шесть часов утра.
Её брат работает учителем; его ученикам семь лет, и они любят читать о животных.
Где живёт учитель? Учитель живёт в старом доме за рынком.
В 1987 году врач купил у соседа собаку, серую кошку и трёх белых лошадей.
Кто старше, моряк или садовник? Моряк старше садовника на 12 лет.
Вчера весь день шёл дождь, поэтому дети остались дома и слушали рассказы бабушки.
Мать художника — писательница. Писательница написала двадцать книг о северном море.
Повтори это предложение слово в слово: рыбак нашёл под деревянным мостом 25 зелёных бутылок.
Перескажи текст одним предложением. Садовник посадил яблони, а осенью продавал яблоки.
Они не знают ответа, но мы спросим старого капитана: он видел все гавани мира."""


@dataclass(frozen=True)
class TinyPair:
    """Two complete Hugging Face folders; `instruct` is `base` plus a small change of every weight."""

    base: Path
    instruct: Path


def tiny_tokenizer(rows: int = 600, texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the embedded pair's kind, trained on the two texts above (mostly English)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=rows,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or ENGLISH.splitlines() * 4 + RUSSIAN.splitlines(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=512,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_pair(folder: Path, *, tied: bool, drift: float = 0.05) -> TinyPair:
    """Write a random Llama pair (hidden 32, 2 layers) whose instruct model drifts by `drift` of a scale."""
    tokenizer = tiny_tokenizer()
    end_of_text, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=end_of_text,
        eos_token_id=end,
        pad_token_id=end_of_text,
        initializer_range=0.1,
    )
    # A generator of its own: fixtures must not move the tests' global random state.
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
        model.generation_config.eos_token_id = [end, end_of_text]
        model.generation_config.pad_token_id = end_of_text
        pair = TinyPair(base=folder / "base", instruct=folder / "instruct")
        for target in (pair.base, pair.instruct):
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * drift * parameter.std(correction=0))
    return pair


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyPair]:
    """A random pair with tied embeddings; read only (copy the folders before changing them)."""
    yield make_pair(tmp_path_factory.mktemp("tiny_pair"), tied=True)


@pytest.fixture(scope="session")
def tiny_pair_untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyPair]:
    """A random pair with its own `lm_head`; read only (copy the folders before changing them)."""
    yield make_pair(tmp_path_factory.mktemp("tiny_pair_untied"), tied=False)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Real tokenizers and texts: RUADAPT_REFERENCE, or `../shared/reference` beside the checkout."""
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("RUADAPT_REFERENCE", root.parent / "shared" / "reference"))
    if not (folder / "tokenizers").is_dir():
        pytest.skip(f"no reference tokenizers at {folder}; set RUADAPT_REFERENCE to their folder")
    return folder


@pytest.fixture
def unmerged_logits(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A function of ids; its dict gets `logits`, those of a trained network before any merge."""
    from ruadapt.training import trainer  # slow to import, and most tests do without

    def watch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        train = trainer._train

        def spy(*arguments):  # type: ignore[no-untyped-def]
            network = train(*arguments)
            with torch.no_grad():  # the adapters apart from the weights
                kept["logits"] = network.eval()(input_ids=ids).logits
            return network

        monkeypatch.setattr(trainer, "_train", spy)
        return kept

    return watch
