"""The text part of a multimodal repository gives the tokens of the whole model, whatever its tensors are called."""

import json

import pytest
import torch
from multimodal_models import NUM_TOKENS, TEXT_MODELS, multimodal_config, multimodal_model, rename_tensors
from safetensors.torch import load_file, save_file
from tiny_models import greedy, run_all
from transformers import AutoConfig

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import ConfigError, UnsupportedModelError
from longspan.models.families import proven_text_parts
from longspan.models.inspect import check_proven
from longspan.models.loader import load_config, load_config_file, load_model

pytestmark = pytest.mark.cover

OPTIONS = {
    "executor": "threads",
    "threads_per_rank": 1,
    "exchange_timeout_s": 60.0,
    "kv_cache_memory": 2**24,
    "context_parallel_size": 2,
    "placement": "striped",
    "page_size": 4,
    "stripe_size": 8,
}


def generate(path, prompts):
    with Engine(EngineConfig(model=path, **OPTIONS)) as engine:
        requests = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in prompts]
        run_all(engine)
    return [request.output_token_ids for request in requests]


def write(path, config):
    path.mkdir(exist_ok=True)
    fields = config if isinstance(config, dict) else config.to_dict()
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


@pytest.mark.cover
@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_a_text_part_gives_the_tokens_of_the_whole_model(model_type):
    model = multimodal_model(model_type)
    assert generate(model.path, model.prompts) == model.token_ids
    assert len({token for tokens in model.token_ids for token in tokens}) > 15


@pytest.mark.cover
@pytest.mark.parametrize(
    ("model_type", "renames"),
    [
        ("gemma3", [("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower.")]),
        ("gemma3", [("language_model.", "model.language_model."), ("multi_modal", "model.multi_modal")]),
        ("mistral3", [("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")]),
    ],
)
def test_both_layouts_of_names_are_read(model_type, renames, tmp_path):
    model = multimodal_model(model_type)
    path = rename_tensors(model.path, tmp_path / "model", *renames)
    assert generate(path, model.prompts) == model.token_ids


@pytest.mark.cover
def test_rejects_a_tensor_that_neither_text_nor_images_need(tmp_path):
    path = rename_tensors(multimodal_model("gemma3").path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), "language_model.model.extra": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 that the config has no place for, such as model\.extra"):
        load_model(path, torch.float32, show_progress=False)


def test_the_config_is_that_of_the_text_part(tmp_path):
    path = write(tmp_path, multimodal_config("gemma4", use_bidirectional_attention="vision", tie_word_embeddings=False))
    for config in (load_config(path)[0], load_config_file(tmp_path / "config.json")):
        assert (config.model_type, config.num_hidden_layers) == ("gemma4_text", 3)
        assert config.tie_word_embeddings  # the outer one counts
        check_proven(config)


@pytest.mark.parametrize(
    ("field", "outer", "inner"), [("eos_token_id", [1, 5], 7), ("tie_word_embeddings", True, False)]
)
@pytest.mark.parametrize("in_file", [True, False])
def test_a_field_that_the_user_gives_to_the_text_part_counts_more_than_the_outer_one(
    tmp_path, field, outer, inner, in_file
):
    fields = multimodal_config("gemma3").to_dict() | ({field: outer} if in_file else {})
    fields["text_config"].pop("eos_token_id")
    path = write(tmp_path, fields)
    (tmp_path / "generation_config.json").write_text("{}")
    overrides = {"text_config": {field: inner}}
    for config in (load_config(path, overrides)[0], load_config_file(tmp_path / "config.json", overrides)):
        assert getattr(config, field) == inner
    if in_file:
        assert getattr(load_config(path)[0], field) == outer


def test_rejects_a_field_that_the_user_gives_to_both(tmp_path):
    path = write(tmp_path, multimodal_config("gemma3"))
    field = {"tie_word_embeddings": True}
    with pytest.raises(ConfigError, match="got tie_word_embeddings inside of text_config and beside it, legal is one"):
        load_config(path, field | {"text_config": field})


def test_the_outer_config_says_that_weights_are_quantised(tmp_path):
    fields = multimodal_config("gemma3").to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 3}}
    with pytest.raises(UnsupportedModelError, match="quantization_config: got bits 3"):
        check_proven(load_config(write(tmp_path, fields))[0])


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (
            "qwen2_5_vl",
            "model_type: got 'qwen2_5_vl', whose text model has no class of its own in Transformers; proven ",
        ),
        ("paligemma", r"model_type: got 'paligemma', a multimodal model, whose text part \(gemma\) was never loaded"),
    ],
)
def test_rejects_a_multimodal_model_without_a_text_part_of_its_own(model_type, message, tmp_path):
    with pytest.raises(UnsupportedModelError, match=message) as refusal:
        load_config(write(tmp_path, AutoConfig.for_model(model_type)))
    assert "\n" not in str(refusal.value)


def test_every_proven_text_part_has_a_model():
    assert list(TEXT_MODELS) == proven_text_parts()


def test_rejects_a_text_part_of_a_family_that_is_not_proven(tmp_path):
    config = AutoConfig.for_model("mistral3", text_config={"model_type": "jamba"})
    with pytest.raises(UnsupportedModelError, match="model_type: got 'jamba', proven is "):
        check_proven(load_config(write(tmp_path, config))[0])
