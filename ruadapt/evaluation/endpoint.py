"""A model behind any OpenAI-compatible server: vLLM, llama.cpp, transformers serve, hosted ones."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from urllib.parse import urlsplit

import openai

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer, Messages


class Endpoint:
    """Chat completions of one model, greedy and seeded with 0 where the server seeds.

    The variable OPENAI_API_KEY holds the key, which goes to the server and nowhere else.

    Args:
        url: base URL, such as `http://localhost:8000/v1`.
        model: its name there.
        timeout: seconds one request may take.
        retries: tries after the first, with growing pauses (the client's own).

    Raises:
        RuadaptError: not a URL of this kind, or one with a password in it.
    """

    def __init__(self, url: str, model: str, *, timeout: float = 600, retries: int = 4) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise RuadaptError(f"{url} is no base URL; give one such as http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query:
            raise RuadaptError(f"put the key of {parts.hostname} into OPENAI_API_KEY, not into the URL")
        self.url, self.model = url, model
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)

    def ask(self, messages: Messages, max_tokens: int) -> Answer:
        """Return the reply to a conversation, or why this request failed after all retries.

        The reason never holds what the server said, for some repeat the key.

        Raises:
            RuadaptError: every request would fail: nobody there, key refused, no such model.
        """
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=max_tokens,
                temperature=0.0,
                seed=0,
            )
        except openai.APITimeoutError:
            return Answer("", failed="time-out")
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise RuadaptError(
                f"{self.url} refuses the key ({error.status_code}); put a valid one into the environment "
                "variable OPENAI_API_KEY"
            ) from None
        except openai.NotFoundError as error:
            raise RuadaptError(
                f"{self.url} knows no model {self.model!r}, or its path is wrong (it often ends in /v1)"
            ) from error
        except openai.APIConnectionError as error:
            raise RuadaptError(
                f"{self.url} can't be reached; start the server, or give its URL. What is done is kept"
            ) from error
        except openai.APIError as error:
            status = getattr(error, "status_code", None)
            return Answer("", failed=f"status {status}" if status else type(error).__name__)
        if not completion.choices:
            return Answer("", failed="a reply without a message")
        choice = completion.choices[0]
        return Answer(choice.message.content or "", cut=choice.finish_reason == "length")

    def ask_all(
        self, conversations: Sequence[Messages], max_tokens: int, parallel: int
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the place of a conversation and its reply as they come in, `parallel` asked at a time."""
        pool = ThreadPoolExecutor(parallel)
        places = {pool.submit(self.ask, messages, max_tokens): n for n, messages in enumerate(conversations)}
        try:
            for future in as_completed(places):
                yield places[future], future.result()
        finally:
            # After an error nobody waits for what was still to be asked.
            pool.shutdown(wait=False, cancel_futures=True)
