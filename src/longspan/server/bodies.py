"""Parsing of bodies to requests: long bodies in a thread, in pieces, and refused by length before all else.

Holds the order in which a long body is checked. Must not know what fields mean, nor routes.
Read next: `longspan.server.protocol`; `longspan.server.app`, which calls this.

Note [Why in pieces]
    A thread that decodes 30 MB in one call holds the GIL for the whole call, and the event loop waits: 15 million
    token ids took 0.4 s, 7 million lists 4 s. So a long body is first cut into the raw text of its fields (0.1 s at
    most), what is too much is refused by counting commas or brackets, and what remains is decoded a piece at a time.
"""

import functools
import re
from typing import Any

import msgspec
from pydantic import ValidationError

from longspan.server.errors import ApiError, describe, describe_place, is_tag
from longspan.server.fields import Body
from longspan.server.protocol import MAX_PROMPTS, PROMPT_RULE
from longspan.server.state import ServerState

LONG_BODY = 2**16
"""Bytes from which a body is read in a thread."""

MAX_FIELD = 2**18
"""Most bytes of JSON of one field of a long body, unless `MAX_FIELDS` or `UNLIMITED` has the field."""

MAX_FIELDS = {"response_format": 2**20, "logit_bias": 2**22, "tools": 2**22, "tool_calls": 2**22}
UNLIMITED = (
    *("prompt", "messages", "tokens", "content", "text", "reasoning_content"),
    *("system", "input", "instructions"),
)
"""Fields that only the limit of the whole body bounds."""

MAX_UNKNOWN = 8
"""Unknown fields of a long body, beyond which no more are looked for: each takes another look at the whole body."""

BOM = b"\xef\xbb\xbf"

_HOLDS_PROMPTS = re.compile(rb'\[\s*["\[]')
_PIECE = 2**18
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read_body(raw: bytes, kind: type[Body], state: ServerState) -> Any:
    """Parse a body to a request; JSON that is no object is returned as it is, for FastAPI to refuse.

    Args:
        raw: the whole body.
        kind: type of the request.
        state: state of the server, for its limits.

    Raises:
        LongspanError, ApiError: the body is not JSON, or no legal request.
    """
    raw = raw.removeprefix(BOM)  # some clients write files as Windows does
    try:
        # Unlike the standard library's parser this one refuses NaN, lone surrogates and bytes that are not UTF-8.
        data = msgspec.json.decode(raw) if len(raw) < LONG_BODY else _LongBody(state).fields(raw, kind)
    except _NOT_JSON as error:
        raise ApiError(400, f"body: not JSON: {error}") from None
    if not isinstance(data, dict):
        return data
    for name in ("logit_bias", "stop_token_ids"):
        value = data.get(name)
        if isinstance(value, (list, dict)):
            _check_count(name, len(value), state)
    return _validate(kind, data, state)


def _validate(kind: type[Body], data: dict[str, Any], state: ServerState) -> Body:
    """Make the request of a body, without its unknown fields if the server drops these."""
    while True:
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            errors = error.errors(include_url=False)
            unknown = [one["loc"] for one in errors if one["type"] == "extra_forbidden"]
            if not unknown or not state.drops_unknown(describe_place(place) for place in unknown):
                message, param = describe(errors)
                raise ApiError(400, message, param=param) from None
            for place in unknown:
                _drop(data, place)


def _drop(data: Any, place: tuple[int | str, ...]) -> None:
    """Remove a field from a body, by the place that pydantic names."""
    *outer, name = [part for part in place if not is_tag(part)]
    for part in outer:
        data = data[part]
    del data[name]


def _check_count(name: str, count: int, state: ServerState) -> None:
    size = state.engine.model.vocab_size
    if count > size:
        raise ApiError(
            400, f"{name}: got {count} entries, legal is at most {size}, the tokens of the model", param=name
        )


class _LongBody:
    """Parser of one long body."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._max_tokens = 1

    def fields(self, raw: "bytes | msgspec.Raw", kind: type[Body]) -> dict[str, Any]:
        """Return the fields of a JSON object, cut by the fields of a request type."""
        cut, unknown = _decode(raw, kind)
        names = type(cut).__struct_fields__[: len(type(cut).__struct_fields__) - len(unknown)]
        found = {name: value for name in names if (value := getattr(cut, name)) is not msgspec.UNSET}
        for name, value in found.items():
            limit = None if name in UNLIMITED else MAX_FIELDS.get(name, MAX_FIELD)
            if limit is not None and len(memoryview(value)) > limit:
                got = f"{len(memoryview(value))} bytes of JSON"
                raise ApiError(400, f"{name}: got {got}, legal is at most {limit}", param=name)
        if "logit_bias" in found:
            _check_count("logit_bias", bytes(found["logit_bias"]).count(b","), self._state)
        if "max_tokens" in found:
            max_tokens = msgspec.json.decode(found["max_tokens"])
            self._max_tokens = max(1, max_tokens) if type(max_tokens) is int else 1
        # Unknown fields go on without their values, for pydantic to name and refuse them, as those of short bodies.
        return {name: self._field(name, value, kind) for name, value in found.items()} | dict.fromkeys(unknown)

    def _field(self, name: str, raw: msgspec.Raw, kind: type[Body]) -> Any:
        text = bytes(raw).strip()
        if name not in UNLIMITED or len(text) < LONG_BODY or text.startswith(b'"'):
            return msgspec.json.decode(text)
        if not text.startswith(b"["):
            raise ApiError(400, f"{name}: legal is a text or a list", param=name)
        if name == "prompt":
            if not _HOLDS_PROMPTS.match(text):
                return self._token_ids(name, text)
            rule = f"legal is {PROMPT_RULE}"
            return [self._field(name, entry, kind) for entry in _entries(name, text, MAX_PROMPTS, rule)]
        if name == "tokens":
            return self._token_ids(name, text)
        if name not in kind.ENTRIES:
            raise ApiError(400, f"{name}: legal is a text", param=name)
        entry_kind, most = kind.ENTRIES[name]
        entries = _entries(name, text, most, f"legal is a list of at most {most}")
        return [self._entry(entry, entry_kind) for entry in entries]

    def _entry(self, raw: msgspec.Raw, kind: type[Body] | None) -> Any:
        is_whole = kind is None or len(memoryview(raw)) < LONG_BODY
        return msgspec.json.decode(raw) if kind is None or is_whole else self.fields(raw, kind)

    def _token_ids(self, name: str, text: bytes) -> list[int]:
        count = text.count(b",") + 1
        if count > self._state.lengths.longest_request:
            self._state.lengths.refuse(name, count, self._max_tokens)
        found: list[int] = []
        start = 1
        while start < len(text):
            end = text.find(b",", start + _PIECE)
            end = len(text) - 1 if end < 0 else end
            try:
                found += msgspec.json.decode(b"[" + text[start:end] + b"]", type=list[int])
            except msgspec.DecodeError:
                rule = PROMPT_RULE if name == "prompt" else "a list of token ids"
                raise ApiError(400, f"{name}: legal is {rule}", param=name) from None
            start = end + 1
        return found


def _entries(name: str, text: bytes, most: int, rule: str) -> list[msgspec.Raw]:
    """Return the raw entries of a list; too many are refused without reading the rest."""
    try:
        cut = msgspec.json.decode(text, type=_list_of(most))
    except msgspec.ValidationError:
        raise ApiError(400, f"{name}: {rule}", param=name) from None
    return [entry for name in cut.__struct_fields__ if (entry := getattr(cut, name)) is not msgspec.UNSET]


def _decode(raw: "bytes | msgspec.Raw", kind: type[Body]) -> tuple[Any, list[str]]:
    """Cut an object into the raw text of its fields; return these, and the names of unknown ones.

    Raises:
        ApiError: it is no object, or has more than `MAX_UNKNOWN` unknown fields.
    """
    unknown: list[str] = []
    cut = _cut(kind)
    while True:
        try:
            return msgspec.json.decode(raw, type=cut), unknown
        except msgspec.ValidationError as error:
            found = re.search("unknown field `(.*)`", str(error), re.DOTALL)
            if found is None:
                raise ApiError(400, "body: legal is a JSON object") from None
            unknown.append(found[1])
        if len(unknown) > MAX_UNKNOWN:
            message, param = describe([{"type": "extra_forbidden", "loc": (name,)} for name in unknown])
            raise ApiError(400, message, param=param)
        ignored = {f"unknown{i}": name for i, name in enumerate(unknown)}
        fields: Any = [(name, msgspec.Raw, msgspec.UNSET) for name in ignored]
        bases = (_cut(kind),)
        cut = msgspec.defstruct("CutWithUnknown", fields, bases=bases, rename=ignored, forbid_unknown_fields=True)


@functools.cache
def _cut(kind: type[Body]) -> Any:
    """Make a type that keeps the raw text of each field and refuses fields that are not there."""
    names = {field.alias or name for name, field in kind.model_fields.items()} | set(kind.REFUSED) | kind.TAKEN
    fields: Any = [(name, msgspec.Raw, msgspec.UNSET) for name in sorted(names)]
    return msgspec.defstruct(f"Cut{kind.__name__}", fields, forbid_unknown_fields=True)


@functools.cache
def _list_of(most: int) -> Any:
    """Make a type that keeps the raw text of each entry of a list, and stops at one too many."""
    fields: Any = [(f"entry{i}", msgspec.Raw, msgspec.UNSET) for i in range(most)]
    return msgspec.defstruct(f"ListOf{most}", fields, array_like=True, forbid_unknown_fields=True)


def kind_of(field: Any) -> type[Body] | None:
    """Return the request type of a route's body, or None."""
    kind = None if field is None else field.field_info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Body) else None
