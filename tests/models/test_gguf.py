"""A GGUF file becomes the model that it was made of, weight for weight; what is not proven is refused by name."""

import os
import shutil
import sys

import numpy as np
import pytest
import torch
from gguf_models import ARCHITECTURES, TEMPLATE, byte_level, sentencepiece, sentencepiece_metadata, write_gguf
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longspan.errors import ConfigError, LongspanError
from longspan.llm import LLM
from longspan.models import gguf_files, model_cache
from longspan.models.gguf_files import gguf_path
from longspan.models.gguf_metadata import LLAMA3_ROPE, llama3_factors
from longspan.models.gguf_tokenizer import BYTE_LEVEL_RULES
from longspan.models.loader import load_config, load_tokenizer, resolve_model
from longspan.models.shape import load_shape
from longspan.types import SamplingParams

pytestmark = pytest.mark.cover

TEXT = "The 1947th day's end, 47 at 1 the in Ångström A\u030a  \n\n  'll <|im_end|>don't"


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    """An empty cache directory."""
    monkeypatch.setattr(model_cache.platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


def assert_same_model(path, expected):
    found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights, expected_weights = found.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name
    ids = torch.arange(3, 90)[None]
    with torch.inference_mode():
        found.set_attn_implementation("eager")
        logits = expected(ids).logits
        torch.testing.assert_close(found(ids).logits, logits, rtol=0, atol=1e-5 * logits.abs().max().item())


@pytest.mark.cover(cases=6)
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_and_logits_are_those_of_the_model_that_the_file_holds(tmp_path, architecture, kind):
    file = tmp_path / "tiny.gguf"
    expected = write_gguf(file, architecture, kind=kind, tied=kind == "Q4_1")
    assert_same_model(gguf_path(file), expected)


def test_a_split_file_is_one_model(tmp_path):
    (tmp_path / "split").mkdir()
    expected = write_gguf(tmp_path / "split", kind="Q8_0", parts=3)
    first = tmp_path / "split" / "m-00001-of-00003.gguf"
    assert_same_model(gguf_path(first), expected)
    assert load_tokenizer(str(first)).chat_template == TEMPLATE
    with pytest.raises(ConfigError, match=r"got part 2 of 3, legal is the first, m-00001-of-00003\.gguf"):
        gguf_path(first.with_name("m-00002-of-00003.gguf"))
    first.with_name("m-00003-of-00003.gguf").unlink()
    with pytest.raises(ConfigError, match=r"no m-00003-of-00003\.gguf"):
        gguf_path(first)


def test_llama_3s_divisors_of_frequencies_become_its_rope_type(tmp_path):
    file = tmp_path / "tiny.gguf"
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, **LLAMA3_ROPE}
    factors = {"rope_freqs.weight": np.array(llama3_factors(16, 10000.0, 32.0), dtype=np.float32)}
    expected = write_gguf(file, tensors=factors, model_options={"rope_parameters": rope})
    assert_same_model(gguf_path(file), expected)
    factors["rope_freqs.weight"][3] *= 1.01
    write_gguf(file, tensors=factors)
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight: got other factors"):
        gguf_path(file)


def test_config_has_what_the_file_says_of_ends_and_lengths(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, more={"llama.rope.scaling.type": "none", "llama.vocab_size": 300})
    config, generation_config = load_config(str(file))
    assert config.max_position_embeddings == 4096
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 3], None)
    assert generation_config.eos_token_id == [2, 3]


# -- tokenizers --------------------------------------------------------------------------------------------------------

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_rule(numbers):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS % numbers), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PUBLISHED = {
    # as `tokenizer.json` of these models has it
    "gpt-2": byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama-bpe": byte_level(split_rule("{1,3}"), ignore_merges=True),
    "qwen2": byte_level(split_rule(""), normalizers.NFC()),
    "smollm": byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
}


@pytest.mark.parametrize("rule", BYTE_LEVEL_RULES)
def test_tokens_are_those_of_the_published_tokenizer(tmp_path, rule):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, pre=rule)
    tokenizer = load_tokenizer(str(file))
    whole, _, rest = TEXT.partition("<|im_end|>")
    expected = [*PUBLISHED[rule].encode(whole).ids, 3, *PUBLISHED[rule].encode(rest).ids]
    assert tokenizer(TEXT)["input_ids"] == expected
    assert tokenizer.decode([3], skip_special_tokens=True) == ""
    assert tokenizer.eos_token_id == 2


def test_rules_differ_on_the_text_that_compares_them():
    assert len({tuple(tokenizer.encode(TEXT).ids) for tokenizer in PUBLISHED.values()}) == len(PUBLISHED)


@pytest.mark.parametrize(
    ("rule", "told", "begins"),
    [
        ("llama-bpe", True, True),
        ("llama-bpe", False, False),
        ("llama-bpe", None, True),
        ("smollm", None, False),
        ("smollm", True, True),
    ],
)
def test_a_text_begins_with_the_token_that_the_file_asks_for(tmp_path, rule, told, begins):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, pre=rule, more={"tokenizer.ggml.add_bos_token": told})
    tokenizer = load_tokenizer(str(file))
    with_it, without = tokenizer("the 47")["input_ids"], tokenizer("the 47", add_special_tokens=False)["input_ids"]
    assert with_it == ([1] if begins else []) + without
    assert 1 not in without


@pytest.mark.parametrize("prefix", [None, True, False])
def test_pieces_with_scores_are_joined_as_sentencepiece_joins_them(tmp_path, prefix):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, more={**sentencepiece_metadata(), "tokenizer.ggml.add_space_prefix": prefix})
    tokenizer = load_tokenizer(str(file))
    text = "the thing  and another, in the Ångström\n  hand 11.the"
    expected = sentencepiece(text, prefix=prefix is not False)
    assert tokenizer(text)["input_ids"] == [1, *expected]  # these texts begin with a token unless the file denies it
    assert len(set(expected)) > 25
    assert tokenizer.decode(expected) == text
    turn = tokenizer(f"{text}<|im_end|>the", add_special_tokens=False)["input_ids"]
    assert turn == [*expected, 3, *sentencepiece("the", prefix=prefix is not False)]


def test_special_tokens_are_those_that_the_file_names(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, more={"tokenizer.ggml.padding_token_id": 3, "tokenizer.ggml.unknown_token_id": None})
    tokenizer = load_tokenizer(str(file))
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert named == (1, 2, 3, None)


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_a_file_is_converted_once_and_again_when_it_changes(tmp_path, monkeypatch, capfd):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    path = gguf_path(file)
    assert "tiny.gguf: 0.00 GB in F32 are dequantised once to 0.00 GB of float32" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(gguf_files, "convert", lambda *_: pytest.fail("converted again"))
        assert gguf_path(file) == path
        assert resolve_model(str(file)) == str(path)
    assert capfd.readouterr().err == ""
    os.utime(file, ns=(1, 1))
    assert gguf_path(file) != path


def test_what_lies_beside_a_file_is_not_read(tmp_path):
    file = tmp_path / "tiny.gguf"
    expected = write_gguf(file)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{")
    assert_same_model(gguf_path(file), expected)


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, cache_home):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ConfigError, match=r"'tiny\.gguf', legal is a GGUF file that can be read"):
        gguf_path(file)
    assert list((cache_home / "longspan").iterdir()) == []


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
def test_greedy_tokens_are_those_of_transformers_on_the_file(tmp_path, ranks, architecture, capfd):
    file = tmp_path / "tiny.gguf"
    expected = write_gguf(file, architecture, kind="Q8_0")
    prompt = list(range(4, 101))
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        greedy = expected.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=[2, 3]
        )
    options = {"executor": "threads", "context_parallel_size": ranks, "page_size": 4, "stripe_size": 8}
    placement = "striped" if ranks > 1 else "auto"
    with LLM(str(file), kv_cache_memory=2**24, device="cpu", placement=placement, **options) as llm:
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=24))
        assert llm.engine.spec.eos_token_ids == (2, 3)
    assert output.outputs[0].token_ids == greedy[0, len(prompt) :].tolist()
    assert f"longspan: {file}: dequantised weights take 0.00 GB of float32\n" in capfd.readouterr().err


def test_a_file_can_be_planned(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    assert load_shape(str(file), "bfloat16").spec.num_layers == 3


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"architecture": "falcon"},
            "general.architecture: got 'falcon', proven in GGUF files is llama, qwen2, qwen2moe",
        ),
        ({"more": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type: got 'yarn', proven is a GGUF file"),
        ({"more": {"general.name": "mistral"}}, "general.name: got 'mistral', for which Transformers makes llama a"),
        ({"more": {"llama.expert_count": 8}}, "llama.expert_count: got 8, proven is a GGUF file without it"),
        ({"more": {"llama.attention.sliding_window": 64}}, "llama.attention.sliding_window: got 64"),
        ({"more": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count: got 8"),
        ({"more": {"llama.attention.value_length": 8}}, "llama.attention.value_length: got 8, proven is 16"),
        ({"more": {"tokenizer.ggml.pre": "tekken"}}, "tokenizer.ggml.pre: got 'tekken', proven is gpt-2"),
        ({"more": {"tokenizer.ggml.pre": None}}, "tokenizer.ggml.pre: got None"),
        ({"more": {"tokenizer.ggml.add_eos_token": True}}, "tokenizer.ggml.add_eos_token: got True, proven is False"),
        ({"more": {"tokenizer.ggml.model": "t5"}}, "tokenizer.ggml.model: got 't5', proven is gpt2"),
        ({"tensors": {"blk.0.attn_q.bias": np.zeros(128, np.float32)}}, "weights, for a model that has"),
    ],
)
def test_rejects_what_transformers_would_pass_over(tmp_path, options, message):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, **options)
    with pytest.raises(ConfigError) as refused:
        gguf_path(file)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rejects_a_quantisation_that_cannot_be_read(tmp_path, monkeypatch):
    import gguf

    file = tmp_path / "tiny.gguf"
    write_gguf(file, kind="Q4_1")

    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(LongspanError, match=r"quantisation: got (Q4_1|F32) in "):
        gguf_path(file)


def test_rejects_files_that_are_no_gguf(tmp_path):
    for data in (b"", b"GGUF", b"no such file" * 100):
        file = tmp_path / "broken.gguf"
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"'broken\.gguf', legal is a GGUF file that can be read"):
            gguf_path(file)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_says_what_to_install(tmp_path, monkeypatch, package):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}; install it with pip install 'longspan\[gguf"):
        gguf_path(file)


def test_rejects_what_the_disk_cannot_hold(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(ConfigError, match="GB as float32, legal is what fits into"):
        gguf_path(file)


def test_the_config_is_a_models_own(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, "qwen3moe")
    config = AutoConfig.from_pretrained(gguf_path(file))
    assert (config.model_type, config.moe_intermediate_size, config.head_dim) == ("qwen3_moe", 32, 32)
    assert AutoTokenizer.from_pretrained(gguf_path(file)).chat_template == TEMPLATE
