"""A model behind any OpenAI-compatible server: vLLM, llama.cpp, transformers serve, hosted ones."""

import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

import openai
from tqdm import tqdm

from ruadapt.errors import RuadaptError

# Requests at a time, and tries of each after the first, with growing pauses.
PARALLEL, RETRIES = 8, 4


def ask_server(place: str, conversations: Sequence[Any], max_tokens: int, temperature: float) -> list[str]:
    """Return the answers of a model on a server in order, "" where it refuses to answer.

    The variable OPENAI_API_KEY holds the key, which goes to the server and nowhere else.

    Args:
        place: `MODEL@URL`, the URL such as `http://localhost:8000/v1`.

    Raises:
        RuadaptError: the URL holds a key, which records would show, or the server fails after all tries.
    """
    model, _, url = place.partition("@")
    if "@" in url:
        raise RuadaptError(f"the key of {model} belongs into OPENAI_API_KEY, not into the URL")
    key = os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES)

    def ask(messages: Any) -> str:
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": 0}
        try:
            reply = client.chat.completions.create(model=model, messages=messages, **options)
        except openai.BadRequestError:  # such as a conversation that is too long
            return ""
        return (reply.choices[0].message.content or "") if reply.choices else ""

    try:
        with ThreadPool(PARALLEL) as pool:
            replies = pool.imap(ask, conversations)
            return list(tqdm(replies, model, len(conversations), unit="answer", leave=False))
    except openai.APIError as error:
        # What the server said is left out: some repeat the key.
        raise RuadaptError(
            f"{url} gives no answers of {model!r} ({type(error).__name__}); see whether it runs and serves "
            "this model, whether the URL ends in /v1, and whether the environment variable OPENAI_API_KEY "
            "holds a valid key. What is done is kept"
        ) from None
