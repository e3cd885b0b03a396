"""Every end token that a model's files name ends an answer; what they set of sampling is what the files set."""

import json
import shutil
from pathlib import Path

import pytest
from serving import served_model
from transformers import AutoConfig, GenerationConfig

from longspan.errors import ConfigError
from longspan.llm import LLM
from longspan.models.generation import end_token_ids, sampling_defaults
from longspan.models.loader import load_config
from longspan.types import SamplingParams

PROMPT = list(range(60, 100))
OPTIONS = {"executor": "threads", "kv_cache_memory": 2**24, "device": "cpu"}


def llama(**fields):
    return AutoConfig.for_model("llama", vocab_size=300, **fields)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 0}, {"eos_token_id": 0}, (0,)),  # SmolLM2 as published; its tokenizer says 2
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 8}, (7, 8, 9)),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 7]}, (7, 8)),
        ({"eos_token_id": None}, {"eos_token_id": 5}, (5,)),
        ({"eos_token_id": []}, {"eos_token_id": []}, ()),
        ({"eos_token_id": None}, {}, ()),
        ({"eos_token_id": 5}, {"eos_token_id": None}, (5,)),
        ({"eos_token_id": 5}, None, (5,)),
        ({"eos_token_id": None}, None, ()),
    ],
)
def test_all_end_tokens_of_the_configs_count(config, generation, expected):
    found = end_token_ids(llama(**config), None if generation is None else GenerationConfig(**generation))
    assert found == expected


@pytest.mark.parametrize("wrong", ["x", -1, True, 1.5, ["x"], [[1]], {"a": 1}])
def test_rejects_end_tokens_that_are_no_token_ids(wrong):
    generation_config = GenerationConfig()
    generation_config.eos_token_id = wrong
    with pytest.raises(ConfigError, match=r"eos_token_id: got .*, legal is a token id, a list of token ids, or null"):
        end_token_ids(llama(), generation_config)


@pytest.fixture(scope="module")
def plain():
    """A model that names no end token, and what it generates."""
    path = Path(served_model().path)
    copy = Path(shutil.copytree(path, path.with_name(f"{path.name}-endless"), dirs_exist_ok=True))
    name_ends(copy, None, None, None)
    with LLM(str(copy), **OPTIONS) as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=40))
    yield copy, output.outputs[0].token_ids
    shutil.rmtree(copy)


def name_ends(path, config, generation, tokenizer):
    for name, fields in (
        ("config.json", {"eos_token_id": config}),
        ("generation_config.json", {"eos_token_id": generation}),
        ("tokenizer_config.json", {"eos_token": tokenizer}),
    ):
        file = path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("source", ["config", "generation", "tokenizer", "list"])
def test_an_answer_ends_at_a_token_that_one_file_alone_names(plain, tmp_path, source):
    path = Path(shutil.copytree(plain[0], tmp_path / "model"))
    idx = next(i for i, token in enumerate(plain[1]) if i >= 5 and token not in plain[1][:i] and token < 256)
    last, other = plain[1][idx], next(token for token in range(256) if token not in plain[1])
    with LLM(str(path), **OPTIONS) as llm:
        text = llm.tokenizer.convert_ids_to_tokens([last])[0]
    ends = {
        "config": (last, other, None),
        "generation": (other, last, None),
        "tokenizer": (other, other, text),
        "list": ([other, last], other, None),
    }
    name_ends(path, *ends[source])
    with LLM(str(path), **OPTIONS) as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=40))
        assert llm.engine.spec.eos_token_ids == tuple(sorted({last, other}))
    assert output.outputs[0].token_ids == plain[1][: idx + 1]
    assert output.outputs[0].finish_reason == "stop"


def test_a_model_without_an_end_says_so(plain, capfd):
    with LLM(str(plain[0]), **OPTIONS) as llm:
        assert llm.engine.spec.eos_token_ids == ()
    assert (
        "longspan: the model names no end token: answers end by max_tokens or a stop text\n" in capfd.readouterr().err
    )


def test_the_default_of_a_configs_class_is_not_the_authors_word(plain, tmp_path):
    path = Path(shutil.copytree(plain[0], tmp_path / "model"))
    name_ends(path, 2, 5, None)
    assert end_token_ids(*load_config(str(path))) == (2, 5)
    file = path / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token_id"}))
    assert end_token_ids(*load_config(str(path))) == (5,)
    (path / "generation_config.json").unlink()
    assert end_token_ids(*load_config(str(path))) == (2,)  # as Transformers has it


def test_an_end_token_outside_of_the_vocabulary_is_none(plain, tmp_path):
    path = Path(shutil.copytree(plain[0], tmp_path / "model"))
    name_ends(path, None, [5, 99_999], None)
    with LLM(str(path), **OPTIONS) as llm:
        assert llm.engine.spec.eos_token_ids == (5,)
        llm.generate([PROMPT], SamplingParams(max_tokens=4, min_tokens=4))


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_sampling_defaults_are_what_the_file_sets():
    given = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05}
    assert sampling_defaults(GenerationConfig(do_sample=True, **given)) == given
    assert sampling_defaults(GenerationConfig(max_new_tokens=2048)) == {"max_tokens": 2048}
    assert sampling_defaults(GenerationConfig(do_sample=False, num_beams=1)) == {}
    assert sampling_defaults(None) == {}


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": "x"}])
def test_rejects_sampling_defaults_that_are_illegal(wrong):
    generation_config = GenerationConfig()
    for name, value in wrong.items():
        setattr(generation_config, name, value)
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {next(iter(wrong))}: got .*--generation-config"):
        sampling_defaults(generation_config)
