"""Texts and bytes of single tokens, for log-probabilities.

Holds the conversion of token ids. Must not know requests.
Read next: `longspan.server.logprobs`.
"""

import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_INCOMPLETE = "\ufffd"


class TokenTexts:
    """Text and bytes of tokens. Only one thread may use it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._byte_of_char = {char: byte for byte, char in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]

    def bytes_of(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text; a special token's are its name."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find(token_id)
        return known

    def text_of(self, token_id: int) -> str:
        """Return a token as text; bytes that are no text alone become replacement characters."""
        return self.bytes_of(token_id).decode("utf-8", errors="replace")

    def name_of(self, token_id: int) -> str:
        r"""Return a token as text, or `bytes:\xe2\x80` if it is no text alone: names differ between tokens."""
        found = self.bytes_of(token_id)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _find(self, token_id: int) -> bytes:
        one = self._decode(token_id)
        if _INCOMPLETE not in one:
            # The first token of a text may lose a leading space, the second one does not.
            return self._decode(token_id, token_id)[len(one) :].encode()
        name = self.tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(name, str):  # an id that the model knows and the tokenizer does not
            return b""
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)
        if byte:
            return bytes([int(byte[1], 16)])
        if all(char in self._byte_of_char for char in name):
            return bytes(self._byte_of_char[char] for char in name)
        return one.encode()

    def _decode(self, *token_ids: int) -> str:
        text = self.tokenizer.decode([*token_ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
