"""A model behind any OpenAI-compatible server: vLLM, llama.cpp, transformers serve, hosted ones."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from urllib.parse import urlsplit

import openai

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer, Messages

_WAYS_OUT = {
    401: "put a valid key into the environment variable OPENAI_API_KEY",
    403: "put a key that may use it into the environment variable OPENAI_API_KEY",
    404: "see which models it serves, and whether the URL ends in /v1",
}


# Of one request, in seconds; and tries after the first, which the client makes with growing pauses.
TIMEOUT, RETRIES = 600, 4


@dataclass(frozen=True)
class Endpoint:
    """Chat completions of one model, greedy and seeded with 0 where the server seeds.

    The variable OPENAI_API_KEY holds the key, which goes to the server and nowhere else.

    Args:
        url: base URL, such as `http://localhost:8000/v1`.
        model: its name there.

    Raises:
        RuadaptError: not a URL of this kind, or one with a key in it.
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or "@" in parts.netloc or parts.query:
            raise RuadaptError(
                f"give {self.model} a base URL such as http://localhost:8000/v1; a key belongs into "
                "OPENAI_API_KEY, not into the URL"
            )

    def ask_all(
        self, conversations: Sequence[Messages], max_tokens: int, parallel: int
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the place of a conversation and its reply as they come in, `parallel` asked at a time.

        Raises:
            RuadaptError: the server fails after all tries. What it said is left out, for some repeat the key.
        """
        key = os.environ.get("OPENAI_API_KEY") or "none"
        client = openai.OpenAI(base_url=self.url, api_key=key, timeout=TIMEOUT, max_retries=RETRIES)
        pool = ThreadPoolExecutor(parallel)
        places = {
            pool.submit(self._ask, client, asked, max_tokens): n for n, asked in enumerate(conversations)
        }
        try:
            for future in as_completed(places):
                yield places[future], future.result()
        except openai.APIError as error:
            status = getattr(error, "status_code", None)
            what = f"status {status}" if status else type(error).__name__
            way_out = _WAYS_OUT.get(status or 0, "see whether it runs, and its log")
            raise RuadaptError(
                f"{self.url} gives no answers of {self.model!r} ({what}); {way_out}. What is done is kept"
            ) from None
        finally:
            # After an error nobody waits for what was still to be asked.
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, client: openai.OpenAI, messages: Messages, max_tokens: int) -> Answer:
        try:
            completion = client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=max_tokens,
                temperature=0.0,
                seed=0,
            )
        except openai.BadRequestError as error:  # such as a conversation that is too long
            return Answer("", failed=f"status {error.status_code}")
        if not completion.choices:
            return Answer("", failed="a reply without a message")
        choice = completion.choices[0]
        return Answer(choice.message.content or "", cut=choice.finish_reason == "length")
