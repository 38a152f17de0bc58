"""A model behind any OpenAI-compatible server: vLLM, llama.cpp, transformers serve, hosted ones."""

import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from ruadapt.errors import RuadaptError
from ruadapt.evaluation.answers import Answer


class UnansweredError(Exception):
    """One request failed for good (time-out, overload, refusal); others may succeed."""


class Endpoint:
    """Chat completions of one model.

    Args:
        url: base URL, such as `http://localhost:8000/v1`.
        model: its name there.
        key_variable: the environment variable that holds the key, which goes to the server and nowhere
            else; local servers need none.
        timeout: seconds one request may take.
        retries: tries after the first, with growing pauses (the client's own; as long as the server asks
            for), after time-outs, lost connections, overload and errors of the server.

    Raises:
        RuadaptError: not a URL of this kind, or one with a password in it.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 120,
        retries: int = 4,
    ) -> None:
        import openai  # takes its time: only where it is used

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise RuadaptError(f"{url} is no base URL; give one such as http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query:
            raise RuadaptError(f"put the key of {parts.hostname} into {key_variable}, not into the URL")
        self.url, self.model = url, model
        self._key_variable = key_variable
        self._client = openai.OpenAI(
            base_url=url,
            api_key=os.environ.get(key_variable) or "none",
            timeout=timeout,
            max_retries=retries,
        )

    def ask(self, messages: Sequence[dict[str, str]], *, max_tokens: int, temperature: float = 0.0) -> Answer:
        """Return the reply to a conversation of `role` and `content`; seeded with 0 where servers seed.

        Raises:
            UnansweredError: this request failed after all retries. The message never holds what the server
                said, for some repeat the key.
            RuadaptError: every request would fail: nobody there, key refused, no such model.
        """
        import openai

        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=list(messages),  # type: ignore[arg-type]
                max_tokens=max_tokens,
                temperature=temperature,
                seed=0,
            )
        except openai.APITimeoutError as error:
            raise UnansweredError("time-out") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise RuadaptError(
                f"{self.url} refuses the key ({error.status_code}); put a valid one into the environment "
                f"variable {self._key_variable}, or name another variable"
            ) from None
        except openai.NotFoundError as error:
            raise RuadaptError(
                f"{self.url} knows no model {self.model!r}, or its path is wrong (it often ends in /v1)"
            ) from error
        except openai.APIConnectionError as error:
            raise RuadaptError(
                f"{self.url} can't be reached; start the server, or give its URL. What is done is kept"
            ) from error
        except openai.APIStatusError as error:
            raise UnansweredError(f"status {error.status_code}") from None
        except openai.APIError as error:
            raise UnansweredError(type(error).__name__) from None
        choices = getattr(completion, "choices", None)
        if not choices or choices[0].message is None:
            raise UnansweredError("a reply without a message")
        return Answer(choices[0].message.content or "", cut=choices[0].finish_reason == "length")
