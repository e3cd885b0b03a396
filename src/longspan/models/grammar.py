"""Grammars that turn a JSON schema into the tokens that may come next.

Holds the use of llguidance, and the map from token ids to bytes that it needs. Must not know requests in flight,
plans or weights.
Read next: `longspan.scheduler.request`, whose `Constraint` is implemented here.

Note [What a token stands for]
    The grammar is about bytes, so every token id needs the bytes that it adds to the text, which tokenizers do not
    tell. Decoding a single token is not enough: some tokenizers drop a space at the start of a text, some add spaces
    between tokens. So a token is decoded between two others that stand for "a":

        byte-level     a Ġwas a        -> "a wasa"     the bytes " was"
        SentencePiece  a ▁was a        -> "a wasa"     the bytes " was"
        byte           a <0xE2> a      -> "a\ufffda"   part of a character: the byte is in the token's name
        WordPiece      a was a         -> "a was a"    and "a a a" for three anchors: no bytes of its own, refused

    Special tokens, ids that only pad the vocabulary of the model, and tokens whose bytes remain unknown stand for
    nothing, and are never allowed. End tokens are allowed exactly when the output is complete.

Note [Which schemas]
    llguidance implements the commonly used part of JSON Schema 2020-12. A keyword that it knows and does not implement
    (`not`, `if`, `uniqueItems`, ...), an unknown `format`, a remote `$ref` or a schema that nothing satisfies is
    refused. Properties come in the schema's order. A key that the schema does not name may occur twice.
    White space between elements is free, up to a length: small models would fill the context with it.

Note [What a vocabulary cannot write]
    Some byte-level vocabularies lack bytes that begin rare characters (SmolLM2: 0xF1 and 0xF2), and some vocabularies
    have no bytes at all. What they cannot write is not generated: a token that ends inside a character is allowed only
    where every continuation byte has a token, so that no output gets stuck there. A schema that names a character that
    cannot be written is refused.
"""

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from longspan.errors import ConfigError, LongspanError
from longspan.types import SamplingParams

_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,20}"
_ANCHOR = "a"
_INCOMPLETE = "\ufffd"
"""Character to which part of a character decodes."""
_ASCII = {bytes([byte]) for byte in range(0x20, 0x7F)}
"""Bytes that JSON is made of: there must be a token for each of them."""
_LATER_BYTES = {bytes([byte]) for byte in range(0x80, 0xC0)}
"""Bytes that end a character of several bytes: with a token for each, every character that was begun can be ended."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class GrammarConstraint:
    """Grammar of one request, at the current end of its output."""

    def __init__(self, matcher: LLMatcher, allowed: bytes | None = None) -> None:
        """Take a matcher, and what it allows next if that is known."""
        self._matcher = matcher
        self._allowed = self._next() if allowed is None else allowed

    def allowed(self) -> bytes:
        """Bit mask of the tokens that may come next, at least one: bit i % 8 of byte i // 8 is token i."""
        return self._allowed

    def copy(self) -> "GrammarConstraint":
        """Copy the state; the compiled grammar is shared."""
        return GrammarConstraint(self._matcher.deep_copy(), self._allowed)

    @property
    def is_complete(self) -> bool:
        """Whether the output could end here."""
        return bool(self._matcher.is_accepting())

    def accept(self, token_id: int) -> None:
        """Take the token that came next.

        Raises:
            LongspanError: the token was not allowed, or the grammar has become too complex to go on.
        """
        if not self._matcher.consume_token(token_id):
            raise LongspanError(f"json_schema: token {token_id} cannot follow: {_reason(self._matcher)}")
        self._allowed = self._next()

    def _next(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():  # the mask then allows an end, after whatever there is
            raise LongspanError(f"json_schema: no token can follow: {_reason(self._matcher)}")
        return mask


def _check_version(found: str) -> None:
    """Refuse an old llguidance, such as vLLM 0.32 requires, which ignores `_WHITE_SPACE`.

    Raises:
        ConfigError: the version is too old.
    """
    if tuple(int(part) for part in found.split(".")[:2]) < (1, 9):
        raise ConfigError(f"json_schema: got llguidance {found}, legal is 1.9 or newer (or vLLM's structured output)")


def _reason(matcher: LLMatcher) -> str:
    """Return llguidance's error in one line."""
    return " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())[:300]


class Grammars:
    """Compiler of schemas for one model. Any thread may use it."""

    def __init__(self, tokenizer: LLTokenizer, tokens: Sequence[bytes], marks: Mapping[int, str]) -> None:
        """Take a prepared tokenizer, the bytes of its tokens, and those that are no text; `make_grammars` makes all."""
        self._tokenizer, self._tokens, self._marks = tokenizer, tokens, marks
        self._known = frozenset(token for token in tokens if token and not token.isascii())
        self._version = importlib.metadata.version("llguidance")

    def compile(self, json_schema: str) -> GrammarConstraint:
        """Compile the constraint of one request. Most schemas take a millisecond, large ones seconds, without the GIL.

        Args:
            json_schema: JSON text of a schema.

        Raises:
            ConfigError: the schema is invalid, cannot be enforced, or cannot be satisfied.
        """
        _check_version(self._version)
        try:
            schema = json.loads(json_schema)
            if "x-guidance" in schema:
                raise ConfigError("json_schema: got the key 'x-guidance', legal are those of JSON Schema")
            self._check_characters(json.dumps(schema, ensure_ascii=False))
            grammar = LLMatcher.grammar_from_json_schema(json_schema, defaults={"whitespace_pattern": _WHITE_SPACE})
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
            if matcher.is_error():
                raise LongspanError(_reason(matcher))
            return GrammarConstraint(matcher)
        except ConfigError:
            raise
        except (ValueError, RecursionError, LongspanError) as error:
            shown = json_schema if len(json_schema) <= 200 else f"{json_schema[:200]}..."
            reason = str(error).removeprefix("json_schema: ")
            raise ConfigError(
                f"json_schema: got {shown!r}, legal is a JSON Schema that can be enforced and satisfied: {reason}"
            ) from None

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token, of a mark such as `<tool_call>` its name's; none where they are unknown."""
        return self._marks[token_id].encode() if token_id in self._marks else self._tokens[token_id]

    def constraint(self, params: SamplingParams) -> GrammarConstraint | None:
        """Compile what sampling parameters ask for; None if the output is free.

        Raises:
            ConfigError: as `compile` and `compile_grammar`.
        """
        if params.json_schema is not None:
            return self.compile(params.json_schema)
        return None if params.grammar is None else self.compile_grammar(params.grammar)

    def compile_grammar(self, grammar: str) -> GrammarConstraint:
        """Compile a grammar in llguidance's dialect of Lark.

        Raises:
            ConfigError: the grammar is invalid, or nothing satisfies it.
        """
        _check_version(self._version)
        try:
            text = LLMatcher.grammar_from_lark(grammar)
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
            if matcher.is_error():
                raise LongspanError(_reason(matcher))
            return GrammarConstraint(matcher)
        except (ValueError, LongspanError) as error:
            shown = grammar if len(grammar) <= 200 else f"{grammar[:200]}..."
            raise ConfigError(f"grammar: got {shown!r}, legal is one that can be satisfied: {error}") from None

    def _check_characters(self, text: str) -> None:
        """Refuse a schema with a character that no tokens of the model write."""
        for char in sorted(set(text)):
            if "\ud800" <= char <= "\udfff":
                continue  # no character: the compiler refuses it
            data = char.encode()
            if len(data) == 1 or data in self._known or all(bytes([byte]) in self._known for byte in data):
                continue
            if not any(data in token for token in self._known):  # else a longer token may hold it
                raise ConfigError(f"json_schema: got the character {char!r}, legal are those that the model can write")


def make_grammars(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Sequence[int]) -> Grammars:
    """Make the grammar compiler of one model. Takes about a second per 100,000 tokens of vocabulary; call it once.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: width of the model's logits, which may exceed the tokenizer's vocabulary.
        eos_token_ids: tokens that end a request.

    Raises:
        ConfigError: the tokenizer does not say what its tokens stand for, or there is no end token.
    """
    end_ids = sorted({token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size})
    if not end_ids:
        raise ConfigError("json_schema: got a model without an end token, legal is one that can end a complete output")
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise _unmapped(tokenizer, "it has no fast implementation")
    backend = _private_copy(tokenizer)
    tokens = _token_bytes(tokenizer, backend, vocab_size)
    for token_id in end_ids:
        tokens[token_id] = b""
    if missing := _ASCII - set(tokens):
        raise _unmapped(tokenizer, f"no token stands for {min(missing)!r} alone")
    if not set(tokens) >= _LATER_BYTES:
        tokens = [token if _is_text(token) else b"" for token in tokens]  # see "what a vocabulary cannot write"
    vocabulary = _Vocabulary(tokens, end_ids[0], backend)
    vocabulary.mapped = LLTokenizer(vocabulary, eos_token=end_ids)
    return Grammars(vocabulary.mapped, tokens, _marks(backend.get_added_tokens_decoder()))


def _is_text(data: bytes) -> bool:
    """Whether bytes are whole characters."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def marks_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens that are no text, such as `<tool_call>`, with their ids: a grammar writes `<[ID]>` for them."""
    return {name: token_id for token_id, name in _marks(tokenizer.added_tokens_decoder).items()}


def special_names(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the special tokens, which decoding leaves out."""
    return frozenset(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _marks(added: Mapping[int, AddedToken]) -> dict[int, str]:
    """Special tokens among those that were added to a vocabulary, and by convention all marks like `<think>`."""
    return {
        token_id: token.content
        for token_id, token in added.items()
        if token.special or (token.content.startswith("<") and token.content.endswith(">"))
    }


def _unmapped(tokenizer: PreTrainedTokenizerBase, reason: str) -> ConfigError:
    return ConfigError(
        f"json_schema: got {type(tokenizer).__name__}, legal is a tokenizer whose tokens stand for bytes: {reason}"
    )


def _private_copy(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Copy a tokenizer, so that no other thread reconfigures it; the copy reads special tokens in a text as text."""
    try:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the library raises nothing more precise where a part is written in Python
        raise _unmapped(tokenizer, f"it cannot be copied ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def _token_bytes(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, vocab_size: int) -> list[bytes]:
    """Bytes of every token id, empty for ids without bytes. See "what a token stands for" above."""
    anchor = backend.token_to_id(_ANCHOR)
    if anchor is None or backend.decode([anchor] * 3) != _ANCHOR * 3:
        raise _unmapped(tokenizer, f"it has no token {_ANCHOR!r}, or adds something between tokens")
    special = {*tokenizer.all_special_ids, *_marks(backend.get_added_tokens_decoder())}
    names = [
        (name, token_id)
        for name, token_id in backend.get_vocab(with_added_tokens=True).items()
        if token_id < vocab_size and token_id not in special
    ]
    texts = backend.decode_batch([[anchor, token_id, anchor] for _, token_id in names], skip_special_tokens=True)
    tokens = [b""] * vocab_size
    for (name, token_id), text in zip(names, texts, strict=True):
        if len(text) > 2 and text.startswith(_ANCHOR) and text.endswith(_ANCHOR):
            tokens[token_id] = _bytes_of(name, text[1:-1])
    return tokens


_BYTES = {name: byte for byte, name in bytes_to_unicode().items()}


def _bytes_of(name: str, text: str) -> bytes:
    """Bytes of the token `name`, which decodes to `text`; empty if they remain unknown."""
    if _INCOMPLETE not in text:
        return text.encode()
    if matched := _BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(matched[1])
    data = bytes(_BYTES[character] for character in name if character in _BYTES)
    return data if len(data) == len(name) and data.decode(errors="replace") == text else b""


class _Vocabulary(TokenizerWrapper):
    """Tokenizer interface of llguidance: bytes of all tokens, and the tokens of a forced text."""

    mapped: LLTokenizer

    def __init__(self, tokens: list[bytes], eos_token_id: int, backend: Tokenizer) -> None:
        self.tokens, self.eos_token_id, self.bos_token_id = tokens, eos_token_id, None
        self.special_token_ids = []
        self.is_tokenizer_wrapper = True
        self._backend = backend

    def __call__(self, text: str) -> list[int]:
        """Token ids whose bytes are those of `text`: the tokenizer's own, or longest first where it adds a space.

        A line break in front takes the space that some tokenizers put before the first word.
        """
        for front, num_dropped in (("", 0), ("\n", 1), ("\n", 2)):
            ids = self._backend.encode(front + text, add_special_tokens=False).ids[num_dropped:]
            parts = [self.tokens[token_id] for token_id in ids if token_id < len(self.tokens)]
            if all(parts) and b"".join(parts) == text.encode():
                return ids
        return self.mapped.greedy_tokenize(text)
