"""Adapters are merged as peft merges them, and those of another model are refused."""

import json
import shutil
from pathlib import Path

import lora_adapters
import pytest
import torch
from proven_models import NUM_TOKENS, proven_model, references_of
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, randomize_, run_all
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import ConfigError
from longspan.models.fingerprint import fingerprint
from longspan.models.loader import load_model
from longspan.models.lora import ADAPTER_CONFIG, WEIGHTS_NAME, check_lora
from longspan.types import SamplingParams

pytestmark = pytest.mark.cover

peft = pytest.importorskip("peft")


def write_adapter(path, base=None, **options):
    return lora_adapters.write_adapter(path, base or proven_model("llama").path, **options)


def engine_config(path, **options):
    return EngineConfig(
        model=str(path),
        executor="threads",
        threads_per_rank=1,
        dtype="float32",
        kv_cache_memory=2**25,
        **options,
    )


def tokens_of(config, references):
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    with Engine(config) as engine:
        requests = [engine.add_request(reference.prompt, params) for reference in references]
        run_all(engine)
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_weights_are_those_that_peft_merges(options, tmp_path):
    adapter = write_adapter(tmp_path, **options)
    path = proven_model("llama").path
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    found = load_model(path, torch.float32, show_progress=False, lora=adapter).state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


def test_a_merged_adapter_gives_the_tokens_of_transformers_on_any_number_of_ranks(tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    base = proven_model("llama")
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    references = references_of(tmp_path / "merged")
    wanted = [reference.token_ids for reference in references]
    striped = {"placement": "striped", "page_size": 4, "stripe_size": 8}
    assert tokens_of(engine_config(base.path, lora=adapter), references) == wanted
    assert tokens_of(engine_config(base.path, lora=adapter, context_parallel_size=3, **striped), references) == wanted
    assert tokens_of(engine_config(base.path), references) != wanted


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_the_hub_is_not_asked_about_the_base_of_an_adapter(options, tmp_path, monkeypatch):
    """Every rank would ask, and wait where there is no network."""
    adapter, asked = write_adapter(tmp_path, **options), []
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "org/name"}))
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *names: asked.append(names))
    path = proven_model("llama").path
    assert load_model(path, torch.float32, show_progress=False, lora=adapter) is not None
    assert not asked


def test_an_adapter_of_whole_embeddings_brings_its_own(tmp_path):
    adapter, path = write_adapter(tmp_path), proven_model("llama").path
    weights = load_file(tmp_path / WEIGHTS_NAME)
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"base_model.model.{name}.weight"] = torch.randn(COMMON["vocab_size"], COMMON["hidden_size"])
    save_file(weights, tmp_path / WEIGHTS_NAME)
    found = load_model(path, torch.float32, show_progress=False, lora=adapter).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name], weights[f"base_model.model.{name}"])


def test_an_adapter_is_merged_before_weights_are_rounded(tmp_path):
    adapter, path = write_adapter(tmp_path), proven_model("llama").path
    one, other = (
        load_model(path, torch.float32, show_progress=False, lora=lora, quantization="int8").state_dict()
        for lora in (adapter, None)
    )
    assert not torch.equal(one["model.layers.0.mlp.down_proj.data"], other["model.layers.0.mlp.down_proj.data"])


def test_a_fingerprint_tells_adapters_apart(tmp_path):
    directory = Path(proven_model("llama").path)
    paths = [Path(write_adapter(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    assert len({fingerprint(directory), *(fingerprint(directory, path) for path in paths)}) == 3
    assert fingerprint(directory, paths[0]) == fingerprint(directory, paths[0])


def tied_model(path):
    """Write a Llama whose embeddings are the weights of its logits."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**COMMON, "tie_word_embeddings": True}))
    randomize_(model)
    model.tie_weights()
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(("changed", "other"), [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")])
def test_rejects_changes_of_weights_that_another_module_shares(changed, other, tmp_path):
    """Merged in place, as peft does it, they would change both."""
    base = tied_model(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", changed.removeprefix("model.")])
    refused(base, adapter, f"an adapter that leaves {changed} alone, whose weights are also those of {other}")


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [5, 6]}}],
)
def test_an_adapter_beside_shared_weights_gives_the_logits_of_peft(options, tmp_path):
    base, tokens = tied_model(tmp_path / "base"), torch.arange(3, 40)[None]
    adapter = write_adapter(tmp_path / "adapter", base, seed=1, noisy=("lora_", "delta", "modules_to_save"), **options)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(plain, adapter).eval()(tokens).logits
    found = load_model(base, torch.float32, show_progress=False, lora=adapter).state_dict()
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON), dtype=torch.float32).eval()
    other.load_state_dict(found)
    torch.testing.assert_close(other(tokens).logits, wanted, rtol=1e-3, atol=1e-3)


def refused(path, adapter, message):
    with pytest.raises(ConfigError, match=f"lora: got .*{message}"):
        load_model(path, torch.float32, show_progress=False, lora=str(adapter))


def test_rejects_an_adapter_of_other_shapes_or_modules(tmp_path):
    adapter = write_adapter(tmp_path / "llama", target_modules=["q_proj"])
    refused(proven_model("qwen2").path, adapter, "an adapter of this model; it does not fit: .*size mismatch")
    refused(proven_model("gpt2").path, adapter, "an adapter of this model; it does not fit: .*q_proj")


def test_rejects_an_adapter_of_fewer_or_more_layers(tmp_path):
    write_adapter(tmp_path)
    weights = load_file(tmp_path / WEIGHTS_NAME)
    name = next(name for name in weights if "layers.2." in name)
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / WEIGHTS_NAME)
    refused(proven_model("llama").path, tmp_path, "an adapter of this model; 1 tensors do not fit, such as .*layers.2")
    save_file(weights | {name.replace("layers.2.", "layers.7."): weights[name].clone()}, tmp_path / WEIGHTS_NAME)
    refused(proven_model("llama").path, tmp_path, "an adapter of this model; 1 tensors do not fit, such as .*layers.7")


@pytest.mark.skipif(not hasattr(peft.LoraConfig(), "alora_invocation_tokens"), reason="older peft has no such adapters")
def test_rejects_an_adapter_that_cannot_be_merged(tmp_path):
    """It works on the tokens behind a text alone."""
    adapter = write_adapter(tmp_path, alora_invocation_tokens=[1, 2])
    refused(proven_model("llama").path, adapter, "an adapter that peft can merge; it says: ")


def test_rejects_what_is_no_lora_adapter(tmp_path):
    with pytest.raises(
        ConfigError, match=r"lora: got .*, legal is a directory with adapter_config\.json and adapter_model"
    ):
        check_lora(str(tmp_path))
    (tmp_path / WEIGHTS_NAME).touch()
    (tmp_path / ADAPTER_CONFIG).write_text("[]")
    with pytest.raises(ConfigError, match=r"legal is a directory whose adapter_config\.json is JSON of an object"):
        check_lora(str(tmp_path))
    (tmp_path / ADAPTER_CONFIG).write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(ConfigError, match="an adapter of peft_type LORA; this one is 'PREFIX_TUNING'"):
        check_lora(str(tmp_path))
    with pytest.raises(ConfigError, match="lora: got"):
        Engine(engine_config(proven_model("llama").path, lora=str(tmp_path)))


def test_rejects_an_adapter_without_peft(tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"legal is none without the package peft: pip install 'longspan\[lora\]'"):
        check_lora(adapter)


def test_rejects_an_adapter_beside_the_weights(tmp_path):
    shutil.copytree(proven_model("llama").path, tmp_path, dirs_exist_ok=True)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ConfigError, match=r"has adapter_config\.json beside the weights"):
        load_model(str(tmp_path), torch.float32, show_progress=False)
