"""Whether two models mean the same text by the same tokens.

Holds a comparison of tokenizers. Must not know requests or drafts.
Read next: `longspan.models.loader`; docs/speculation.md.
"""

from transformers import PreTrainedTokenizerBase

from longspan.errors import ConfigError
from longspan.models.loader import load_tokenizer
from longspan.models.names import draft_refusal


def check_draft_tokenizer(draft: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a draft model whose tokens are others than those of the model that checks its drafts.

    Args:
        draft: model that makes drafts, as the user named it; None for none.
        tokenizer: of the other model.

    Raises:
        ConfigError: it has no tokenizer, or another one.
    """
    if draft is None:
        return
    try:
        found, expected = load_tokenizer(draft).get_vocab(), tokenizer.get_vocab()
    except ConfigError as error:
        raise draft_refusal(draft, error) from error
    if found == expected:
        return
    text, token_id = min(expected.items() - found.items() or found.items() - expected.items(), key=lambda item: item[1])
    raise ConfigError(
        f"speculative_config: got the draft model {draft!r}, legal is one with the model's tokenizer: only one of them "
        f"has the token {text!r} as {token_id}"
    )
