"""vLLM's server against transformers: ids, greedy tokens, an adapter, the prefix cache, a choice.

    python -m benchmarks.served OUT.csv path/to/vllm FOLDER...
    python -m benchmarks.served OUT.csv path/to/vllm --families qwen2.5 --families gemma

`--families` takes the real tokenizers of RUADAPT_REFERENCE, extended and pruned, on random models with small
matrices. All models run in float32.
"""

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import pandas as pd
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.gguf import HELDOUT, family_folders, reference
from benchmarks.measuring import show
from ruadapt.errors import RuadaptError
from ruadapt.files import atomic_write, read_texts
from ruadapt.vocab import load_tokenizer

LINES = {"ru": 400, "en": 300}
ANSWERS, TOKENS = 4, 24
CHOICE = ["река", "гора"]
START_SECONDS = 600


@contextmanager
def served(program: Path, folder: Path, adapter: Path) -> Iterator[httpx.Client]:
    """Serve a folder as `model`, and with its adapter as `adapter`; yield a client of the server.

    Raises:
        RuadaptError: the server ends, or says nothing for ten minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        program,
        "serve",
        folder,
        "--served-model-name",
        "model",
        "--port",
        port,
        "--max-model-len",
        512,
    ]
    command += ["--dtype", "float32", "--enforce-eager", "--enable-prefix-caching"]
    command += ["--enable-lora", "--lora-modules", f"adapter={adapter}"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.pop("PYTHONPATH", None)  # that of this process is not for the server's own Python
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
                _wait(client, process, log)
                yield client
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Any) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            if client.get("/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(1)
    log.seek(0)
    raise RuadaptError(f"the server did not start: {log.read()[-2000:]}")


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
    """Return how many ids and answers of the server differ from those of tokenizers and transformers."""
    lines = {
        language: list(read_texts(reference() / "text" / name))[: LINES[language]]
        for language, name in HELDOUT.items()
    }
    texts = [*lines["ru"], *lines["en"]]
    tokenizer = load_tokenizer(folder)
    ids = [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]
    prompts = [numbers[:60] for numbers in ids if len(numbers) >= 60][:ANSWERS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = [_greedy(model, prompt) for prompt in prompts]
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(scratch)
        bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        network = PeftModel.from_pretrained(bare, scratch)
        adapted = [_greedy(network, prompt) for prompt in prompts]
        with served(program, folder, Path(scratch)) as client:
            found = [
                _posted(client, "/tokenize", model="model", prompt=text, add_special_tokens=False)["tokens"]
                for text in texts
            ]
            said = [_completion(client, prompt)["token_ids"] for prompt in prompts]
            again = [_completion(client, prompt)["token_ids"] for prompt in prompts]
            hits = re.search(r"^vllm:prefix_cache_hits_total\S* (\S+)", client.get("/metrics").text, re.M)
            other = [_completion(client, prompt, "adapter")["token_ids"] for prompt in prompts]
            rule = {"choice": CHOICE}
            chosen = [_completion(client, prompt, structured_outputs=rule)["text"] for prompt in prompts]
    return {
        "texts": len(texts),
        "ids_differ": sum(one != two for one, two in zip(ids, found, strict=True)),
        "answers": len(prompts),
        "answers_differ": sum(one != two for one, two in zip(plain, said, strict=True)),
        "cached_tokens": int(float(hits[1])) if hits else 0,
        "cached_answers_differ": sum(one != two for one, two in zip(plain, again, strict=True)),
        "adapter_changes": sum(one != two for one, two in zip(plain, adapted, strict=True)),
        "adapter_answers_differ": sum(one != two for one, two in zip(adapted, other, strict=True)),
        "choices_kept": sum(text in CHOICE for text in chosen),
    }


@torch.inference_mode()
def _greedy(model: Any, prompt: Sequence[int]) -> list[int]:
    ends = model.generation_config.eos_token_id
    ids = torch.tensor([list(prompt)])
    said = model.generate(input_ids=ids, do_sample=False, max_new_tokens=TOKENS, eos_token_id=ends)
    return [int(number) for number in said[0, len(prompt) :]]


def main(
    out: Annotated[Path, typer.Argument(help="The table to write.")],
    program: Annotated[Path, typer.Argument(help="vLLM's program.")],
    folders: Annotated[list[Path] | None, typer.Argument(help="Model folders.")] = None,
    families: Annotated[list[str] | None, typer.Option(help="Tokenizers of RUADAPT_REFERENCE.")] = None,
) -> None:
    """Compare the server with transformers for each model, and write one table."""
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        every = {folder.name: folder for folder in folders or ()}
        for name in families or ():
            made = family_folders(Path(scratch) / name, name, head_size=64)
            every |= {f"{name}, {kind}": folder for kind, folder in made.items() if kind != "original"}
        for name, folder in every.items():
            row = {"model": name, **compared(program, folder)}
            show("model", row)
            table.append(row)
            atomic_write(out, pd.DataFrame(table).to_csv(index=False))


if __name__ == "__main__":
    typer.run(main)
