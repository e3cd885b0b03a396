"""The bundled model's tokenizer: one token per UTF-8 byte, and nothing else.

Holds the vocabulary of `longspan.models.recall` and the tokenizer that Transformers loads for it. Must not know the
model's weights. Read next: `longspan.models.recall`.

The contract, for any text that has a UTF-8 form:

    encode(text) == [BOS_ID, *text.encode("utf-8")]        decode(encode(text), skip_special_tokens=True) == text

Special tokens exist as ids only. The *characters* `<|eos|>` in a text are seven bytes like any others, so no document
can end a generation or fake the start of a context; a caller that wants the token puts `EOS_ID` among the ids. This
relies on `split_special_tokens` in tokenizer_config.json, so load the tokenizer with Transformers: tokenizer.json
alone, read by the `tokenizers` library, would match the characters.

The chat template concatenates the messages' contents and adds nothing, not even the beginning-of-sequence token, whose
characters would be split into bytes too. The model does without it, and the prompt of the next turn starts with this
turn's prompt and reply, byte for byte.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|sep|>")
"""Special tokens, with ids from 256 on. The last one has no meaning: tests use it as a token that no text contains."""
BOS_ID, EOS_ID, PAD_ID, SEP_ID = range(NUM_BYTES, NUM_BYTES + len(SPECIAL_TOKENS))
VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def build_tokenizer(model_max_len: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer; `save_pretrained` writes its files.

    Args:
        model_max_len: Longest context of the model, in tokens; Transformers warns about longer texts.

    Returns:
        A tokenizer that keeps the contract in this module's docstring.
    """
    vocabulary = {name: byte for byte, name in _byte_names().items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Without the regex a text is one "word"; with it the result is the same, only slower: there are no merges.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        pad_token=SPECIAL_TOKENS[2],
        sep_token=SPECIAL_TOKENS[3],
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_len,
        chat_template=CHAT_TEMPLATE,
    )


def _byte_names() -> dict[int, str]:
    """Return the printable character that ByteLevel tokenizers write for each byte.

    Visible Latin-1 characters stand for themselves; the others, in order, are moved to U+0100 and up.

    Source: `bytes_to_unicode` in GPT-2's encoder.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    names: dict[int, str] = {}
    num_moved = 0
    for byte in range(NUM_BYTES):
        if byte in visible:
            names[byte] = chr(byte)
        else:
            names[byte] = chr(NUM_BYTES + num_moved)
            num_moved += 1
    return names
