"""`ruadapt export gguf`: what llama.cpp reads is what transformers reads, or there is no file.

What opens files needs llama-cpp-python (`pip install 'ruadapt[gguf]'`) and llama.cpp's converter, in the
folder that RUADAPT_LLAMA_CPP names. llama.cpp's own programs are looked for in `build/bin` there.
"""

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, ENGLISH, RUSSIAN, SPECIAL_TOKENS, TinyPair
from test_vocab_families import byte_fallback_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

from ruadapt.checkpoints import initialise
from ruadapt.checkpoints.gguf_export import export_gguf
from ruadapt.checkpoints.model_folders import read_layout
from ruadapt.cli import app
from ruadapt.errors import RuadaptError
from ruadapt.evaluation.endpoint import ask_server
from ruadapt.files import read_json, write_json
from ruadapt.vocab import extend, load_tokenizer, optimize, save_tokenizer, train_replacement
from ruadapt.vocab.save import PROBES
from ruadapt.vocab.sentencepiece_file import PIECES_FILE, random_texts, write_pieces

run = CliRunner()
CORPUS = [*RUSSIAN.splitlines(), *ENGLISH.splitlines()] * 2
# The rules of tokenizer.json as these families have them, each with its architecture.
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|"
TEKKEN += REST.replace(r"[\r\n]*", r"[\r\n/]*")
BYTE_LEVEL: dict[str, tuple[str, Any, str]] = {
    "qwen": ("qwen2", rf"{LETTERS}|\p{{N}}|{REST}", "qwen2"),
    "llama-3": ("llama-bpe", rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}", "llama"),
    "mistral-nemo": ("tekken", TEKKEN, "mistral"),
    "smollm": ("smollm", pre_tokenizers.Digits(individual_digits=True), "llama"),
    "gpt-2": ("gpt-2", None, "llama"),
}
SENTENCEPIECE = {"llama-2": "llama", "mistral": "mistral", "gemma": "gemma3_text"}
FAMILIES = [*BYTE_LEVEL, *SENTENCEPIECE]


def byte_level_tokenizer(rules: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not isinstance(rules, str))
    first = pre_tokenizers.Split(Regex(rules), "isolated") if isinstance(rules, str) else rules
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, last]) if first else last
    tokenizer.decoder = decoders.ByteLevel()
    options: Any = {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL_TOKENS, **options)
    tokenizer.train_from_iterator(ENGLISH.splitlines() * 4 + RUSSIAN.splitlines(), trainer)
    return tokenizer


def gemma_tokenizer() -> Tokenizer:
    """No space before the first word, and tokens for line ends that are added but not special."""
    tokenizer = byte_fallback_tokenizer()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n", "\n\n")])
    return tokenizer


def original_model(folder: Path, family: str) -> Path:
    """Write a random model of a family's architecture with a tokenizer of its kind, and a chat template."""
    if family in BYTE_LEVEL:
        tokenizer, kind = byte_level_tokenizer(BYTE_LEVEL[family][1]), BYTE_LEVEL[family][2]
        named = dict(bos_token="<|endoftext|>", eos_token="<|end|>")
    else:
        tokenizer = gemma_tokenizer() if family == "gemma" else byte_fallback_tokenizer()
        tokenizer.add_special_tokens(SPECIAL_TOKENS)
        kind, named = SENTENCEPIECE[family], dict(bos_token="<s>", eos_token="<|end|>", unk_token="<unk>")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    wrapped.chat_template = CHAT_TEMPLATE
    end, end_of_text = wrapped.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    sizes |= {"bos_token_id": wrapped.bos_token_id, "eos_token_id": end, "pad_token_id": end_of_text}
    if family == "gemma":  # llama.cpp takes the heads' size for it
        sizes |= {"query_pre_attn_scalar": 16}
    config = CONFIG_MAPPING[kind](vocab_size=len(wrapped), initializer_range=0.1, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [end, end_of_text]
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    if family in ("llama-2", "mistral"):  # as the hub's folders have it; Gemma's copies often lack it
        write_pieces(folder / PIECES_FILE, tokenizer)
    return folder


@pytest.fixture(scope="session", params=FAMILIES)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's original, extended by 60 rows and initialised; Gemma's is pruned before."""
    folder = tmp_path_factory.mktemp(request.param)
    original = original_model(folder / "original", request.param)
    pruned = request.param == "gemma"
    words = optimize(original, CORPUS, 440, 60) if pruned else extend(original, CORPUS, 60)
    save_tokenizer(folder / "words", words, original)
    initialise(original, folder / "words", folder / request.param)
    write_json(folder / request.param / "ruadapt.json", RECORD)
    return folder / request.param


RECORD = {"command": "ruadapt init", "made_from": {"base": {"name": "someone/tiny"}}}


@pytest.fixture(scope="session")
def converter() -> Path:
    if not (named := os.environ.get("RUADAPT_LLAMA_CPP")):
        pytest.skip("RUADAPT_LLAMA_CPP names no folder of llama.cpp")
    return Path(named)


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[Any]:
    yield pytest.importorskip("llama_cpp", reason="pip install 'ruadapt[gguf]' compiles it")


@pytest.fixture(scope="session")
def exported(adapted: Path, converter: Path, llama_cpp: Any) -> Path:
    target = adapted.parent / "f32.gguf"
    called = ["export", "gguf", adapted, target, "--type", "f32", "--converter", converter, "--json"]
    result = run.invoke(app, [str(each) for each in called])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    family = adapted.name
    assert found["tokenizer"] == (BYTE_LEVEL[family][0] if family in BYTE_LEVEL else "SentencePiece")
    assert found["bytes"] == target.stat().st_size
    return target


# llama.cpp's form of Tekken's rules knows no case but that of a to z, and no marks: for the original, too.
CASE = re.compile(r"[а-яё][А-ЯЁ]|\u0301")


def opened(llama_cpp: Any, file: Path, **options: Any) -> Any:
    return llama_cpp.Llama(str(file), n_ctx=256, verbose=False, n_threads=1, **options)


def test_llama_cpp_reads_the_ids_of_transformers(adapted: Path, exported: Path, llama_cpp: Any) -> None:
    reader, tokenizer = opened(llama_cpp, exported, vocab_only=True), AutoTokenizer.from_pretrained(adapted)
    chat = [{"role": "user", "content": "Где живёт врач?\n\nIn  the house №12."}]
    texts = [*CORPUS, *PROBES, tokenizer.apply_chat_template(chat, tokenize=False)]
    texts += random_texts(load_tokenizer(adapted), 300, seed=11)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if adapted.name == "mistral-nemo" and CASE.search(text):
            continue
        assert reader.tokenize(text.encode(), add_bos=False, special=True) == ids, text
        whole = tokenizer(text)["input_ids"]  # llama.cpp adds what the tokenizer adds
        assert reader.tokenize(text.encode(), add_bos=True, special=True) == whole


def test_the_file_keeps_what_the_folder_says(adapted: Path, exported: Path, llama_cpp: Any) -> None:
    reader, tokenizer = opened(llama_cpp, exported, vocab_only=True), AutoTokenizer.from_pretrained(adapted)
    assert reader.metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert json.loads(reader.metadata["ruadapt.record"]) == {"run": {}, "surgery": RECORD}
    assert reader.token_eos() == tokenizer.eos_token_id and reader.token_bos() == tokenizer.bos_token_id
    words = llama_cpp.llama_model_get_vocab(reader.model)
    for number in range(len(tokenizer)):
        ends = tokenizer.convert_ids_to_tokens(number) in ("<|end|>", "<|endoftext|>", "</s>")
        assert llama_cpp.llama_vocab_is_eog(words, number) == ends


# Root mean square of the difference, relative to that of the logits. Nothing is that near by chance: 1.4.
ACCURACY = {"f32": 0.002, "f16": 0.004, "bf16": 0.03, "q8_0": 0.05}


@pytest.mark.parametrize("kind", ACCURACY)
def test_logits_agree_to_the_accuracy_of_the_type(
    adapted: Path, exported: Path, converter: Path, llama_cpp: Any, tmp_path: Path, kind: str
) -> None:
    file = exported
    if kind != "f32":
        file = tmp_path / f"{kind}.gguf"
        export_gguf(adapted, file, kind, converter=converter)
        assert file.stat().st_size < exported.stat().st_size
    model, tokenizer = AutoModelForCausalLM.from_pretrained(adapted), AutoTokenizer.from_pretrained(adapted)
    reader = opened(llama_cpp, file, logits_all=True)
    ids = tokenizer("Пекарь живёт в маленьком городе. The baker 25.")["input_ids"]
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    reader.eval(ids)
    found = np.array(reader.scores[: len(ids)])
    error = np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean())
    assert error < ACCURACY[kind]
    if kind == "f32":
        written = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=None)
        spoken = [int(found[-1].argmax())]
        while len(spoken) < 12:
            reader.eval(spoken[-1:])
            spoken.append(int(reader.scores[reader.n_tokens - 1].argmax()))
        assert spoken == written[0, len(ids) :].tolist()


@pytest.fixture(scope="session")
def programs(converter: Path) -> Path:
    folder = converter / "build" / "bin"
    if missing := [name for name in PROGRAMS if not (folder / name).is_file()]:
        pytest.skip(f"{folder} has no {', '.join(missing)} (docs/compatibility.md says how they are built)")
    return folder


PROGRAMS = ("llama-tokenize", "llama-perplexity", "llama-server")
QUESTION = [{"role": "user", "content": "Где живёт врач?"}]


def said(program: Path, *arguments: object) -> tuple[str, str]:
    """Run a program of llama.cpp, and return what it wrote to standard output and to standard error."""
    done = subprocess.run(
        [program, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, timeout=300
    )
    out, log = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    assert done.returncode == 0, log[-2000:]
    return out, log


def answer(adapted: Path, prompt: str, count: int) -> str:
    """Return what transformers writes greedily behind a prompt whose special tokens are spelled out."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(adapted), AutoTokenizer.from_pretrained(adapted)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(ids, do_sample=False, max_new_tokens=count)[0].tolist()
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[0].tolist(), written))
    return str(whole).removeprefix(before)


def test_llama_tokenize_gives_the_ids_of_transformers(
    adapted: Path, exported: Path, programs: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapted)
    lines = [*CORPUS, *PROBES, tokenizer.apply_chat_template(QUESTION, tokenize=False)]
    lines += random_texts(load_tokenizer(adapted), 200, seed=12)
    if adapted.name == "mistral-nemo":
        lines = [line for line in lines if not CASE.search(line)]
    text = tmp_path / "text.txt"
    text.write_bytes("\n".join(lines).encode())
    out, _ = said(programs / "llama-tokenize", "-m", exported, "-f", text, "--ids", "--no-escape")
    assert json.loads(out.splitlines()[-1]) == tokenizer(text.read_bytes().decode())["input_ids"]


def test_llama_perplexity_is_that_of_transformers(
    adapted: Path, exported: Path, programs: Path, tmp_path: Path
) -> None:
    """It cuts text into windows begun by BOS, and scores the second half of each."""
    text, size = tmp_path / "text.txt", 64
    text.write_text("\n".join(CORPUS))
    options = ["-c", size, "-b", size, "-t", 1, "--no-escape"]
    _, log = said(programs / "llama-perplexity", "-m", exported, "-f", text, *options)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(adapted), AutoTokenizer.from_pretrained(adapted)
    ids = tokenizer(text.read_text())["input_ids"]
    windows = torch.tensor(ids[: len(ids) // size * size]).reshape(-1, size)
    targets = windows[:, size // 2 + 1 :].clone()
    if ids[0] == tokenizer.bos_token_id:
        windows[:, 0] = ids[0]
    with torch.no_grad():
        logits = model(windows).logits[:, size // 2 : -1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).exp()
    found = re.search(r"PPL = ([0-9.]+)", log)
    assert found and float(found[1]) == pytest.approx(float(wanted), rel=1e-3)


def test_llama_server_chats_as_transformers_does(adapted: Path, exported: Path, programs: Path) -> None:
    """By the chat template in the file, asked as `ruadapt arena` asks MODEL@URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [programs / "llama-server", "-m", exported, "-t", 1, "-c", 256, "--port", port]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        # It asks again until the server is up.
        (found,) = ask_server(f"adapted@http://127.0.0.1:{port}/v1", [QUESTION], 24, 0.0)
    finally:
        server.kill()
        server.wait()
    prompt = AutoTokenizer.from_pretrained(adapted).apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True
    )
    wanted = answer(adapted, prompt, 24)
    # Bytes that are no UTF-8: transformers shows one sign for each, the server one for several.
    assert re.sub("\ufffd+", "\ufffd", found) == re.sub("\ufffd+", "\ufffd", wanted)


def test_the_originals_hash_tells_the_rules(tiny_pair: TinyPair, converter: Path, tmp_path: Path) -> None:
    """Rules that are not in the table are found from the original's hash, or refused where it has none."""
    folder = original_model(tmp_path / "model", "llama-3")
    spec = read_json(folder / "tokenizer.json")
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|$^"  # otherwise spelled
    write_json(folder / "tokenizer.json", spec)
    with pytest.raises(RuadaptError, match="give the folder of the original with --original"):
        export_gguf(folder, tmp_path / "model.gguf", converter=converter)
    with pytest.raises(RuadaptError, match="other rules than"):
        export_gguf(folder, tmp_path / "model.gguf", converter=converter, original=tiny_pair.base)
    with pytest.raises(RuadaptError, match="BPE pre-tokenizer was not recognized"):
        export_gguf(folder, tmp_path / "model.gguf", converter=converter, original=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The folder of a converter that writes nothing, for errors that come before it or from it."""
    (tmp_path / "llama.cpp").mkdir()
    path = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    path.write_text("raise SystemExit('this is no converter')\n")
    return path.parent


def test_bad_input_is_one_error_and_no_file(
    tiny_pair: TinyPair, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, target = tiny_pair.base, tmp_path / "out" / "model.gguf"
    target.parent.mkdir()

    def refused(match: str, folder: Path = base, file: Path = target, **options: Any) -> None:
        with pytest.raises(RuadaptError, match=match):
            export_gguf(folder, file, **{"converter": script, **options})
        assert list(target.parent.iterdir()) == []

    refused(r"there is no .*nowhere.convert_hf_to_gguf\.py; give llama\.cpp", converter=tmp_path / "nowhere")
    refused("this is no converter", converter=script)
    refused("is no .gguf", file=tmp_path / "out" / "model.bin")
    unigram = train_replacement(CORPUS, base, "unigram", 640)
    save_tokenizer(tmp_path / "words", unigram, base)
    initialise(base, tmp_path / "words", tmp_path / "unigram")
    refused("Unigram vocabulary.*no reader", folder=tmp_path / "unigram")
    refused("q4_k_m is none of .*call llama.cpp's `llama-quantize`", kind="q4_k_m")
    weights = sum(tensor.numel() for tensor in read_layout(base).tensors.values())
    monkeypatch.setattr("ruadapt.files.free_bytes", lambda folder: 2 * weights)  # none for the vocabulary
    refused("but the disk has")
    existing = tmp_path / "taken.gguf"
    existing.write_text("mine")
    refused("exists", file=existing)
    assert existing.read_text() == "mine"
