"""Use of a tokenizer's chat template: a conversation becomes a prompt.

Holds the call, and the errors that a template may raise. Must not know requests, nor who speaks.
Read next: `longspan.server.templates`, which offers tools too; `longspan.cli.chat_model`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from longspan.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError)
"""Errors that a template raises for messages that it was not written for."""

_PLACE = "\x00"
"""Message that stands for any other."""


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the token ids of a conversation, up to where the model's next answer begins.

    Args:
        tokenizer: tokenizer with a chat template.
        messages: messages with `role` and `content`, oldest first.

    Raises:
        ConfigError: there is no template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ConfigError("messages: the model has no chat template, legal is a model for chats, or a plain prompt")
    try:
        text = tokenizer.apply_chat_template([*map(dict, messages)], tokenize=False, add_generation_prompt=True)
    except TEMPLATE_ERRORS as error:
        raise ConfigError(f"messages: the chat template refuses them: {error}") from None
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has its own
    return token_ids


def frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str] | None:
    """Return the texts that a chat template puts before and behind a lone message; None if there is no template.

    Raises:
        ConfigError: the template refuses a lone message, or changes it.
    """
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": _PLACE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TEMPLATE_ERRORS as error:
        raise ConfigError(f"model: its chat template refuses a lone message: {error}") from None
    before, found, behind = str(text).partition(_PLACE)
    if not found:
        raise ConfigError("model: its chat template changes a message, legal is one that keeps it")
    return before, behind


def misses_template(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    """Whether a model is made for chats, and a raw prompt lacks the marks that its template puts behind a message."""
    try:
        marks = frame(tokenizer)
    except ConfigError:
        return False
    return marks is not None and bool(marks[1].strip()) and marks[1].strip() not in text
