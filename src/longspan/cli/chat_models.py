"""Two ways to get the answer to a conversation: a model that this process runs, and a server.

Holds the protocol, and one class for each way. Must not know how a conversation is led or shown.
Read next: `longspan.cli.chat_session`, which leads it.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from longspan.cli.progress import Counts
from longspan.errors import ConfigError, LongspanError
from longspan.llm import Progress
from longspan.types import SamplingParams

if TYPE_CHECKING:
    from longspan.llm import LLM

Message = Mapping[str, str]
"""Message with `role` and `content`."""

SILENCE_S = 600.0
"""Seconds of silence after which a server counts as gone; ours sends a sign of life every few seconds."""


class Display(Protocol):
    """Who sees an answer while it comes."""

    def progress(self, progress: Progress) -> None:
        """Show how far the request is, and its new text."""

    def thought(self, text: str) -> None:
        """Show what the model thinks, which is no part of the answer."""


class ChatModel(Protocol):
    """What answers."""

    name: str

    def answer(self, messages: Sequence[Message], display: Display) -> Counts:
        """Answer a conversation.

        Args:
            messages: all messages, oldest first.
            display: gets the answer as it comes.

        Raises:
            LongspanError: there is no answer.
        """


class LoadedModel:
    """Model that this process runs."""

    def __init__(
        self, llm: "LLM", name: str, params: SamplingParams, *, clamps_max_tokens: bool, adapter: str | None = None
    ) -> None:
        """Use a model that is loaded.

        Args:
            llm: the model.
            name: how its user calls it.
            params: sampling parameters of every answer.
            clamps_max_tokens: whether `max_tokens` counts only as far as it fits.
            adapter: name of the LoRA adapter of every answer, or None.

        Raises:
            ConfigError: the model is not made for chats.
        """
        if llm.tokenizer.chat_template is None:
            raise ConfigError(
                f"model: got {name!r}, which has no chat template, legal is a model for chats; "
                "`longspan generate` continues plain text"
            )
        self.name = name if adapter is None else f"{name} with {adapter}"
        self._llm, self._params, self._clamps, self._adapter = llm, params, clamps_max_tokens, adapter

    def answer(self, messages: Sequence[Message], display: Display) -> Counts:
        from longspan.models.chat_template import encode_chat

        started = time.perf_counter()
        prompt = encode_chat(self._llm.tokenizer, messages)
        (output,) = self._llm.generate(
            prompt,
            self._params,
            lora=self._adapter,
            on_progress=display.progress,
            clamps_max_tokens=self._clamps,
        )
        (completion,) = output.outputs
        if completion.error is not None:
            raise LongspanError(completion.error)
        num_generated = len(completion.token_ids)
        return Counts(
            len(prompt), output.num_cached_tokens, num_generated, output.ttft_s, time.perf_counter() - started
        )


class ServedModel:
    """Model behind an address of OpenAI's API."""

    def __init__(self, url: str, api_key: str | None, fields: Mapping[str, Any], name: str | None = None) -> None:
        """Ask the server for its models.

        Args:
            url: address of the server, with or without `/v1`.
            api_key: key that the server asks for, or None.
            fields: fields of every request beside its messages.
            name: which of its models to ask; None for the first.

        Raises:
            ConfigError: the server has no model of this name.
            LongspanError: no server answers there, or it refuses.
        """
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key.strip()}"
        with self._open("/models", None) as response:
            models = msgspec.json.decode(response.read())["data"]
        if not models:
            raise LongspanError(f"{self._base} serves no model")
        names = [str(model["id"]) for model in models]
        if name is not None and name not in names:
            raise ConfigError(f"adapter: got {name!r}, legal is one of {', '.join(names)}, which the server has")
        self.name = names[0] if name is None else name
        self._fields: dict[str, Any] = {**fields, "model": self.name, "stream": True}
        self._fields["stream_options"] = {"include_usage": True}
        if models[0].get("owned_by") == "longspan":  # others may refuse what they do not know
            self._fields["return_progress"] = True

    def answer(self, messages: Sequence[Message], display: Display) -> Counts:
        started = time.perf_counter()
        usage: dict[str, Any] = {}
        first_s: float | None = None
        num_generated, total, done, left_s = 0, 0, 0, None
        with self._open("/chat/completions", {**self._fields, "messages": [*map(dict, messages)]}) as response:
            for event in _events(response):
                if "error" in event:
                    raise LongspanError(str(event["error"].get("message", event["error"])))
                usage = event.get("usage") or usage
                if (progress := event.get("prompt_progress")) is not None:
                    total, done, left_ms = progress["total"], progress["processed"], progress.get("time_left_ms")
                    left_s = None if left_ms is None else left_ms / 1000
                delta = event["choices"][0]["delta"] if event.get("choices") else {}
                text, thought = delta.get("content") or "", delta.get("reasoning_content") or ""
                now_s = time.perf_counter() - started
                if text or thought:
                    first_s = now_s if first_s is None else first_s
                    num_generated += 1  # a chunk may have several tokens: the usage at the end knows
                if thought:
                    display.thought(thought)
                display.progress(Progress(0, total, done, num_generated, now_s, left_s, text))
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        num_generated = usage.get("completion_tokens", num_generated)
        return Counts(usage.get("prompt_tokens", total), cached, num_generated, first_s, time.perf_counter() - started)

    def _open(self, path: str, body: Mapping[str, Any] | None) -> http.client.HTTPResponse:
        data = None if body is None else msgspec.json.encode(body)
        request = urllib.request.Request(self._base + path, data, self._headers)
        try:
            response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=SILENCE_S)
        except urllib.error.HTTPError as error:
            raise LongspanError(f"the server answers {error.code}: {_message(error.read())}") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
            raise LongspanError(f"{self._base}: {getattr(error, 'reason', error)}") from None
        return response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a stream until its end mark."""
    try:
        for line in response:
            if not line.startswith(b"data:"):
                continue  # comments and empty lines
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    except (OSError, http.client.HTTPException) as error:
        raise LongspanError(f"the server's stream broke off: {error}") from None
    raise LongspanError("the server's stream broke off")


def _message(body: bytes) -> str:
    """Return the message of an error response; its text if it has none."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")[:200]
