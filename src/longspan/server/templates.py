"""Use of the model's chat template: conversations become prompts.

Holds the call of the template, its variables, and the way to offer tools to a model whose template knows none. Must not
know requests in flight or answers.
Read next: `longspan.server.messages`, what goes in; `longspan.server.chat`, which continues the prompt.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from longspan.errors import ConfigError
from longspan.models.chat_template import TEMPLATE_ERRORS
from longspan.models.detokenizer import token_ids_of
from longspan.server.errors import ApiError
from longspan.server.messages import Message, Tool
from longspan.server.state import ServerState

_RESERVED = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
"""Variables that a request sets by fields of its own."""

_TOOLS_TEXT = """# Tools

You may call functions. Their signatures, in JSON Schema, are within <tools></tools>:
<tools>
{tools}
</tools>

For each call, write a JSON object with the function's name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": NAME, "arguments": ARGUMENTS}}
</tool_call>"""
"""System text for a template that knows no tools: what Hermes and Qwen models were trained on."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template renders."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template that the request sets by `chat_template_kwargs`."""
    reasoning_effort: str | None = None
    wants_answer: bool = True
    """Whether the prompt ends where the model's answer begins."""
    continues: bool = False
    """Whether the answer goes on in the last message."""
    add_special_tokens: bool = False
    """Whether the tokenizer adds special tokens; templates have their own."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Prompt of a conversation."""

    text: str
    token_ids: list[int]


async def render(state: ServerState, conversation: Conversation) -> RenderedPrompt:
    """Return the prompt of a conversation.

    Raises:
        ApiError: the model has no template, or the template refuses the messages or a variable.
    """
    if state.tokenizers.tokenizer.chat_template is None:
        raise ApiError(
            400,
            f"messages: the model {state.model_name!r} has no chat template; use /v1/completions with a prompt",
            param="messages",
            code="no_chat_template",
        )
    text_of_template = template_text(state.tokenizers.tokenizer)
    variables = _variables(conversation, text_of_template)
    turns = [message.for_template() for message in conversation.messages]
    tools: list[Any] | None = [tool.for_template() for tool in conversation.tools] or None
    if "tools" not in text_of_template:
        turns, tools = _with_tools_as_text(turns, tools or []), None

    def encode(tokenizer: PreTrainedTokenizerBase) -> RenderedPrompt:
        try:
            text = tokenizer.apply_chat_template(
                turns,
                tools=tools,
                tokenize=False,
                add_generation_prompt=conversation.wants_answer and not conversation.continues,
                continue_final_message=conversation.continues,
                **variables,
            )
        except TEMPLATE_ERRORS as error:
            raise ApiError(400, f"messages: the chat template refuses them: {error}", param="messages") from None
        assert isinstance(text, str)
        # A template that begins with the BOS token must not get a second one.
        has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        adds = conversation.add_special_tokens and not has_bos
        return RenderedPrompt(text, token_ids_of(tokenizer, text, add_special_tokens=adds))

    prompt = await state.tokenizers.run(encode, sum(len(message.text) for message in conversation.messages))
    if not prompt.token_ids:
        raise ApiError(400, "messages: they come to no tokens, legal is at least one", param="messages")
    return prompt


def use_template_(tokenizer: PreTrainedTokenizerBase, given: str | None) -> None:
    """Set the chat template of a tokenizer, and try the one that it has then.

    Args:
        tokenizer: the model's tokenizer.
        given: the option `chat_template`.

    Raises:
        ConfigError: there is no such file or name, or the template is broken.
    """
    own = tokenizer.chat_template
    if given is not None:
        tokenizer.chat_template = _named_template(own, given)
    if tokenizer.chat_template is None:
        return
    try:
        _try_template(tokenizer)
    except TemplateSyntaxError as error:
        shown = "that of the model" if given is None else repr(given[:100])
        raise ConfigError(
            f"chat_template: got {shown}, legal is a Jinja template: {error.message} (line {error.lineno})"
        ) from None


def _try_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render a message. A template may refuse it, as some want a system message first, but it must be one."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except TemplateSyntaxError:
        raise
    except TEMPLATE_ERRORS:
        return


def _named_template(own: str | dict[str, str] | None, given: str) -> str:
    names = own if isinstance(own, dict) else {}
    if given in names:
        return names[given]
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = f", or one of the model's {', '.join(names)}" if names else ""
        raise ConfigError(
            f"chat_template: got {given[:200]!r}, legal is a file in UTF-8, a text with {{{{ or {{%{known}: {error}"
        ) from None


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a tokenizer's templates, all of them; empty if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return "\n".join(template.values())
    return template or ""


def _variables(conversation: Conversation, template: str) -> dict[str, Any]:
    """Return the template's variables.

    Raises:
        ApiError: one is set by another field, or the template knows no effort.
    """
    variables = dict(conversation.variables)
    if wrong := sorted(_RESERVED & set(variables)):
        raise ApiError(
            400,
            f"chat_template_kwargs: got {', '.join(wrong)}, legal are variables that no other field sets",
            param="chat_template_kwargs",
        )
    effort = conversation.reasoning_effort
    if effort is None:
        return variables
    if "reasoning_effort" in template:
        variables.setdefault("reasoning_effort", effort)
    elif "enable_thinking" in template:
        variables.setdefault("enable_thinking", effort != "none")
    elif effort != "none":
        raise ApiError(
            400,
            f"reasoning_effort: got {effort!r} (or thinking enabled), legal is none: this chat template knows neither",
            param="reasoning_effort",
        )
    return variables


def _with_tools_as_text(turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write tools, calls and results as text, for a template that knows none of them."""
    found: list[dict[str, Any]] = []
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        found.append({"role": "system", "content": _TOOLS_TEXT.format(tools=lines)})
    for turn in turns:
        text, role = turn["content"], turn["role"]
        for call in turn.get("tool_calls", ()):
            body = json.dumps(call["function"], ensure_ascii=False)
            text += "\n" * bool(text) + f"<tool_call>\n{body}\n</tool_call>"
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        kept = {name: value for name, value in turn.items() if name not in ("tool_calls", "tool_call_id")}
        is_beside_tools = role == "system" and bool(tools) and len(found) == 1
        same = is_beside_tools or (turn["role"] == "tool" and bool(found) and found[-1]["role"] == "user")
        if same:  # many templates admit one system message, and roles that alternate
            found[-1] = {
                **found[-1],
                "content": f"{text}\n\n{found[-1]['content']}"
                if role == "system"
                else f"{found[-1]['content']}\n{text}",
            }
        else:
            found.append({**kept, "role": role, "content": text})
    return found
