"""A model behind any OpenAI-compatible server: vLLM, llama.cpp, transformers serve, hosted ones."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import openai
from joblib import Parallel, delayed
from tqdm import tqdm

from ruadapt.errors import RuadaptError

# Of one request, in seconds; and tries after the first, which the client makes with growing pauses.
TIMEOUT, RETRIES = 600, 4


@dataclass(frozen=True)
class Endpoint:
    """Chat completions of one model, greedy and seeded with 0 where the server seeds.

    The variable OPENAI_API_KEY holds the key, which goes to the server and nowhere else.

    Args:
        url: base URL, such as `http://localhost:8000/v1`.
        model: its name there.
    """

    url: str
    model: str

    def ask_all(
        self, conversations: Sequence[Any], max_tokens: int, parallel: int
    ) -> list[tuple[str, bool, str]]:
        """Return text, whether the limit cut it off, and why the server refused ("") of each reply, in order.

        Raises:
            RuadaptError: the URL holds a key, which records would show, or the server fails after all tries.
        """
        if "@" in self.url:
            raise RuadaptError(f"the key of {self.model} belongs into OPENAI_API_KEY, not into the URL")
        key = os.environ.get("OPENAI_API_KEY") or "none"
        client = openai.OpenAI(base_url=self.url, api_key=key, timeout=TIMEOUT, max_retries=RETRIES)

        def ask(messages: Any) -> tuple[str, bool, str]:
            try:
                reply = client.chat.completions.create(
                    model=self.model, messages=messages, max_tokens=max_tokens, temperature=0.0, seed=0
                )
            except openai.BadRequestError as error:  # such as a conversation that is too long
                return "", False, f"status {error.status_code}"
            if not reply.choices:
                return "", False, "a reply without a message"
            choice = reply.choices[0]
            return choice.message.content or "", choice.finish_reason == "length", ""

        replies = Parallel(parallel, backend="threading", return_as="generator")(
            delayed(ask)(messages) for messages in conversations
        )
        try:
            return list(tqdm(replies, self.model, len(conversations), unit="answer", leave=False))
        except openai.APIError as error:
            # What the server said is left out: some repeat the key.
            raise RuadaptError(
                f"{self.url} gives no answers of {self.model!r} ({type(error).__name__}); see whether it "
                "runs and serves this model, whether the URL ends in /v1, and whether the environment "
                "variable OPENAI_API_KEY holds a valid key. What is done is kept"
            ) from None
