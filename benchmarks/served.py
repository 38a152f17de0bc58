"""vLLM's server against transformers: ids, greedy tokens, an adapter, the prefix cache, guided decoding.

    python -m benchmarks.served OUT.csv path/to/vllm FOLDER...
    python -m benchmarks.served OUT.csv path/to/vllm --family qwen2.5 --family gemma

`--family` takes a real tokenizer of RUADAPT_REFERENCE, adapted in each way, on random models with small
matrices. All models run in float32. vLLM may be installed anywhere.
"""

import math
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any

import httpx
import pandas as pd
import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.gguf import HELDOUT, KINDS, family_folder, reference
from benchmarks.measuring import show
from ruadapt.data_sets import read_texts
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write
from ruadapt.vocab import load_tokenizer
from ruadapt.vocab.save import PROBES
from ruadapt.vocab.sentencepiece_file import random_texts

LINES, RANDOM = 400, 1000  # held-out lines of each language, random texts
PROMPT, TOKENS = 160, 24  # of each answer; a CPU's cache goes by blocks of 128 tokens
START_SECONDS = 600
CHOICE, PATTERN = ["река", "гора"], "[А-Я][а-яё]{3,9} — [0-9]{2}"


@contextmanager
def served(program: Path, folder: Path, adapter: Path) -> Iterator[httpx.Client]:
    """Serve a folder as `model`, and with its adapter as `adapter`; yield a client of the server.

    Raises:
        RuadaptError: the server ends, or says nothing for ten minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--served-model-name model --port {port} --max-model-len 512 --dtype float32 --enforce-eager"
    command: list[str | Path] = [program, "serve", folder, *options.split(), "--enable-lora"]
    command += ["--lora-modules", f"adapter={adapter}"]
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = os.environ | offline
    environment.pop("PYTHONPATH", None)  # that of this process is not for the server's own Python
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
                end = time.monotonic() + START_SECONDS
                while not _is_up(client):
                    if process.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        raise RuadaptError(f"the server did not start: {log.read()[-2000:]}")
                    time.sleep(1)
                yield client
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


def _posted(client: httpx.Client, path: str, **content: Any) -> Any:
    reply = client.post(path, json=content)
    if reply.is_error:
        raise RuadaptError(f"{path}: {reply.text[:500]}")
    return reply.json()


def _completion(client: httpx.Client, prompt: Sequence[int], name: str = "model", **options: Any) -> Any:
    settings: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    found = _posted(client, "/v1/completions", model=name, prompt=list(prompt), **settings | options)
    return found["choices"][0]


def compared(program: Path, folder: Path) -> dict[str, Any]:
    """Return in how many texts and answers the server differs from tokenizers and transformers.

    `largest_gap` is by how much transformers prefers its own token where an answer first differs, in logits;
    0.0 where none differs.
    """
    tokenizer = load_tokenizer(folder)
    lines = {name: list(read_texts(reference() / "text" / file))[:LINES] for name, file in HELDOUT.items()}
    texts = [*lines["ru"], *lines["en"], *PROBES, *random_texts(tokenizer, RANDOM, seed=1)]
    ids = [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]
    whole = [tokenizer.encode("\n".join(part), add_special_tokens=False).ids for part in lines.values()]
    prompts = [part[first : first + PROMPT] for part in whole for first in (0, PROMPT)]
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        with served(program, folder, Path(scratch)) as client:
            found = [
                _posted(client, "/tokenize", model="model", prompt=text, add_special_tokens=False)["tokens"]
                for text in texts
            ]
            said = [_completion(client, prompt)["token_ids"] for prompt in prompts]
            again = [_completion(client, prompt)["token_ids"] for prompt in prompts]
            hits = re.search(r"^vllm:prefix_cache_hits_total\S* (\S+)", client.get("/metrics").text, re.M)
            other = [_completion(client, prompt, "adapter")["token_ids"] for prompt in prompts]
            guided = [
                [
                    _completion(client, prompt, structured_outputs=rule, max_tokens=60)["text"]
                    for prompt in prompts
                ]
                for rule in ({"choice": CHOICE}, {"regex": PATTERN})
            ]
            version = client.get("/version").json()["version"]
    adapted = [_greedy(model, prompt) for prompt in prompts]
    gaps = {"adapter_answers": _gaps(model, prompts, adapted, other)}
    with model.disable_adapter():
        plain = [_greedy(model, prompt) for prompt in prompts]
        gaps |= {"answers": _gaps(model, prompts, plain, said)}
        gaps |= {"cached_answers": _gaps(model, prompts, plain, again)}
    return {
        "texts": len(texts),
        "ids_differ": sum(one != two for one, two in zip(ids, found, strict=True)),
        "answers": len(prompts),
        **{f"{kind}_differ": len(gaps[kind]) for kind in ("answers", "cached_answers", "adapter_answers")},
        "largest_gap": max([0.0, *chain.from_iterable(gaps.values())]),
        "cached_tokens": int(float(hits[1])) if hits else 0,
        "adapter_changes": sum(one != two for one, two in zip(plain, adapted, strict=True)),
        "choices_kept": sum(text in CHOICE for text in guided[0]),
        "patterns_kept": sum(bool(re.fullmatch(PATTERN, text)) for text in guided[1]),
        "vllm": version,
    }


@torch.inference_mode()
def _greedy(model: Any, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([list(prompt)])
    said = model.generate(input_ids=ids, do_sample=False, max_new_tokens=TOKENS)
    return [int(number) for number in said[0, len(prompt) :]]


@torch.inference_mode()
def _gaps(
    model: Any, prompts: list[list[int]], wanted: list[list[int]], found: list[list[int]]
) -> list[float]:
    """Return, for each answer that differs, what the model's own token has over the other in logits."""
    gaps = []
    for prompt, one, two in zip(prompts, wanted, found, strict=True):
        if one != two:
            pairs = enumerate(zip(one, two, strict=False))
            place = next((place for place, pair in pairs if pair[0] != pair[1]), None)
            if place is None:  # one of them ends too early
                gaps.append(math.inf)
                continue
            logits = model(torch.tensor([prompt + one[:place]])).logits[0, -1]
            gaps.append(float(logits[one[place]] - logits[two[place]]))
    return gaps


def main(
    out: Annotated[Path, typer.Argument(help="The table to write.")],
    program: Annotated[Path, typer.Argument(help="vLLM's program.")],
    folders: Annotated[list[Path] | None, typer.Argument(help="Model folders.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="Tokenizers of RUADAPT_REFERENCE.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="How they are adapted; every way by default.")
    ] = None,
) -> None:
    """Compare the server with transformers for each model, and write one table."""
    table = []
    for name, folder in _models(folders or [], product(kind or KINDS[1:], family or [])):
        row = {"model": name, **compared(program, folder)}
        show("model", row)
        table.append(row)
        atomic_write(out, pd.DataFrame(table).to_csv(index=False))


def _models(folders: Iterable[Path], made: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Path]]:
    yield from ((folder.name, folder) for folder in folders)
    for kind, name in made:
        with tempfile.TemporaryDirectory() as scratch:  # 32: the smallest of vLLM's on a CPU
            yield f"{name}, {kind}", family_folder(Path(scratch), name, kind, head_size=32)


if __name__ == "__main__":
    typer.run(main)
