"""Weights of 8 and 4 bits give the tokens that Transformers gives with the dense weights that they stand for."""

import pytest
import torch
from proven_models import NUM_TOKENS, SPREADS, proven_model, references_of
from quantized_models import (
    awq,
    compressed_options,
    compressed_packed,
    compressed_plain,
    fp8_blocks,
    gptq,
    is_linear,
    write_repository,
)
from tiny_models import run_all
from transformers import AutoModelForCausalLM

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.errors import ConfigError, UnsupportedModelError
from longspan.models.cpu_experts import mixtures_of
from longspan.models.loader import load_model
from longspan.models.packed_experts import PackedExperts
from longspan.models.packed_linear import PackedLinear, linear_names, rounded
from longspan.models.speedups import FUSED_LAYERS, speed_up_, speedups_of
from longspan.native import kernels, packed
from longspan.native.packed import unpack
from longspan.types import SamplingParams

pytestmark = pytest.mark.cover

needs_kernel = pytest.mark.skipif(not kernels.is_available(), reason="no C compiler when longspan was installed")

GROUPED = {"strategy": "group", "group_size": 32, "num_bits": 4}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FLOAT32 = {"dtype": torch.float32}  # of scales: with others compressed-tensors rounds products, which kernels do not
KEPT = {
    "gptq": (gptq(32), GPTQ),
    "awq": (awq(32), AWQ),
    "w4a16": (compressed_packed(4, 32, **FLOAT32), compressed_options("pack-quantized", **GROUPED)),
    "w4a16-zeros": (
        compressed_packed(4, 32, is_symmetric=False, **FLOAT32),
        compressed_options("pack-quantized", **GROUPED, symmetric=False),
    ),
    "w8a16": (compressed_packed(8, None, **FLOAT32), compressed_options("pack-quantized")),
    "int8": (compressed_plain("int", **FLOAT32), compressed_options("int-quantized")),
}


KEPT_SPREADS = ("one", "gather_kv", "pass_q", "pass_kv", "packed", "pass_q")


def config_of(path, **options):
    return EngineConfig(
        **{
            "model": str(path),
            "executor": "threads",
            "threads_per_rank": 1,
            "exchange_timeout_s": 60.0,
            "dtype": "float32",
            "kv_cache_memory": 2**25,
            **options,
        }
    )


def check(path, references, spread, **options):
    """Compare tokens and log-probabilities with those of Transformers; return the facts of the model."""
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    with Engine(config_of(path, **SPREADS[spread], **options)) as engine:
        requests = [engine.add_request(reference.prompt, params) for reference in references]
        run_all(engine)
        spec = engine.spec
    eager_error = max(reference.eager_error for reference in references)
    for request, reference in zip(requests, references, strict=True):
        assert request.output_token_ids == reference.token_ids
        error = max(abs(one.logprob - p) for one, p in zip(request.logprobs, reference.logprobs, strict=True))
        assert error <= 3 * eager_error + 2e-6
    return spec


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Repositories by name, with what Transformers makes of the dense weights."""
    made = {}

    def make(name):
        if name not in made:
            repository = write_repository(tmp_path_factory.mktemp(name), "llama", *KEPT[name])
            made[name] = (repository, references_of(repository.dense_path))
        return made[name]

    return make


@needs_kernel
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_packed_layers_are_fused(family, quantization):
    """Fusing proves at load that the layer's own modules compute the same."""
    model = load_model(proven_model(family).path, torch.float32, show_progress=False, quantization=quantization)
    speed_up_(model)
    assert FUSED_LAYERS in speedups_of(model)


@pytest.mark.parametrize(("name", "spread"), list(zip(KEPT, KEPT_SPREADS, strict=True)))
def test_kept_weights_give_the_tokens_of_dequantised_ones(name, spread, kept):
    repository, references = kept(name)
    spec = check(repository.path, references, spread, quantization="keep")
    model = load_model(repository.path, torch.float32, show_progress=False, quantization="keep")
    assert spec.weight_bytes == sum(weight.nbytes for weight in model.parameters())
    names = [part for part, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert len(names) == 3 * 7
    dense = load_model(repository.dense_path, torch.float32, show_progress=False)
    for part in names:
        assert torch.equal(unpack(model.get_submodule(part).matrix), dense.get_submodule(part).weight)


def test_a_dequantised_repository_gives_the_same_tokens(kept):
    repository, references = kept("gptq")
    spec = check(repository.path, references, "pass_kv")
    assert spec.weight_bytes == 4 * sum(
        weight.numel() for weight in load_model(repository.path, torch.float32, show_progress=False).parameters()
    )


def rounded_twin(path, name, bits):
    """Write a model whose linear layers have the weights that rounding leaves."""
    model = AutoModelForCausalLM.from_pretrained(proven_model(name).path, dtype=torch.float32)
    output = model.get_output_embeddings()
    model.config.tie_word_embeddings = False
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    for part in linear_names(model):
        linear = model.get_submodule(part)
        linear.weight.data = unpack(rounded(linear.weight.data, 8 if linear is output else bits))
    for _, experts in mixtures_of(model):
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight.data = torch.stack([unpack(rounded(one, bits)) for one in weight.data])
    model.save_pretrained(path)
    return references_of(path)


ROUNDED = [
    ("llama", 8, "one"),
    ("llama", 4, "gather_kv"),
    ("gemma3_text", 8, "pass_kv"),
    ("qwen3", 4, "pass_q"),
    ("youtu", 8, "pass_q"),
    ("minicpm3", 4, "gather_kv"),
    ("mixtral", 8, "pass_q"),
    ("qwen3_moe-mlp", 4, "pass_kv"),
    ("qwen3_5_text", 8, "pass_q"),
    ("lfm2", 4, "pass_kv"),
]


@pytest.mark.parametrize(("family", "bits", "spread"), ROUNDED)
def test_rounded_weights_give_the_tokens_that_transformers_gives_with_them(family, bits, spread, tmp_path):
    references = rounded_twin(tmp_path, family, bits)
    path = proven_model(family).path
    spec = check(path, references, spread, quantization=f"int{bits}")
    model = load_model(path, torch.float32, show_progress=False, quantization=f"int{bits}")
    assert spec.weight_bytes == sum(weight.nbytes for weight in model.parameters())
    assert spec.weight_bytes < sum(weight.nbytes for weight in load_dense(path).parameters())


def load_dense(path):
    return load_model(path, torch.float32, show_progress=False)


@pytest.mark.parametrize(("family", "spread"), [("youtu", "pass_kv"), ("minicpm3", "pass_q")])
def test_kept_weights_leave_the_projection_of_latents_dense(family, spread, tmp_path):
    """Attention takes its parts as matrices. Files may have it small all the same."""
    narrow = "q_b_proj.weight"  # 24 columns: no group of 32
    matters = lambda name: is_linear(name) and not name.endswith(narrow)  # noqa: E731
    repository = write_repository(tmp_path, family, gptq(32), GPTQ, matters=matters)
    spec = check(repository.path, references_of(repository.dense_path), spread, quantization="keep")
    model = load_model(repository.path, torch.float32, show_progress=False, quantization="keep")
    assert spec.weight_bytes == sum(weight.nbytes for weight in model.parameters())
    for layer in model.model.layers:
        assert isinstance(layer.mlp.gate_proj, PackedLinear)
        assert isinstance(layer.self_attn.o_proj, PackedLinear)
        assert type(layer.self_attn.kv_b_proj) is torch.nn.Linear


def test_one_wrong_scale_changes_tokens(kept, monkeypatch):
    """A mutation: without it the tests above would prove nothing."""
    repository, references = kept("gptq")
    honest = PackedLinear.matrix.fget

    def shifted(layer):
        matrix = honest(layer)
        return matrix._replace(scale=matrix.scale.roll(1, 0))

    monkeypatch.setattr(PackedLinear, "matrix", property(shifted))
    with pytest.raises(AssertionError):
        check(repository.path, references, "one", quantization="keep")


def test_scales_that_the_library_would_round_with_are_kept_as_they_are(tmp_path):
    made = write_repository(
        tmp_path, "llama", compressed_packed(4, 32), compressed_options("pack-quantized", **GROUPED)
    )
    kept, dense = (
        load_model(made.path, torch.float32, show_progress=False, quantization=quantization)
        for quantization in ("keep", "none")
    )
    name = "model.layers.1.mlp.up_proj"
    found, wanted = unpack(kept.get_submodule(name).matrix), dense.get_submodule(name).weight
    assert torch.equal(found.bfloat16().float(), wanted)
    assert not torch.equal(found, wanted)


@needs_kernel
@pytest.mark.parametrize("bits", [4, 8])
@torch.inference_mode()
def test_small_experts_compute_the_same_for_few_tokens_and_for_many(bits):
    path = proven_model("mixtral").path
    model = load_model(path, torch.float32, show_progress=False, quantization=f"int{bits}")
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert len(experts) == len(model.model.layers)
    x, scores = torch.randn(100, 64), torch.rand(100, experts[0].num_experts).topk(2)
    few, many = (experts[0](x[:n], scores.indices[:n], scores.values[:n]) for n in (packed.MAX_ROWS, 100))
    torch.testing.assert_close(few, many[: packed.MAX_ROWS], rtol=0, atol=1e-5 * many.abs().max().item())


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_rejects_rounding_experts_that_have_no_kernel(family):
    message = f"quantization: got 'int4' for a {family}, whose experts have no kernel, legal is none"
    with pytest.raises(UnsupportedModelError, match=message):
        Engine(config_of(proven_model(family).path, quantization="int4"))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rejects_rounding_a_model_whose_layers_would_stay_dense(quantization):
    message = rf"quantization: got '{quantization}' for a gpt2, whose layers are transposed \(Conv1D\) and would stay"
    with pytest.raises(UnsupportedModelError, match=message):
        Engine(config_of(proven_model("gpt2").path, quantization=quantization))


def test_rejects_keeping_what_is_not_small(tmp_path):
    with pytest.raises(UnsupportedModelError, match="got 'keep' for dense weights, legal is none, int8 or int4"):
        Engine(config_of(proven_model("llama").path, quantization="keep"))
    options = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    made = write_repository(tmp_path, "llama", fp8_blocks(32), options)
    with pytest.raises(
        UnsupportedModelError, match="got 'keep' for quantised weights that no kernel takes as they are"
    ):
        Engine(config_of(made.path, quantization="keep"))


def test_rejects_small_weights_on_a_gpu_and_with_an_adapter():
    with pytest.raises(ConfigError, match="quantization: got 'int8' with device 'cuda', legal there is none"):
        config_of("recall", quantization="int8", device="cuda")
    with pytest.raises(ConfigError, match=r"lora: got .* with quantization .keep., legal there is NAME=DIR"):
        config_of("recall", quantization="keep", lora="adapter")
    with pytest.raises(ConfigError, match="quantization: got 'int3', legal is one of none, keep, int8, int4"):
        config_of("recall", quantization="int3")


def test_rejects_options_that_a_loaded_model_would_ignore():
    path = proven_model("llama").path
    for options in ({"quantization": "int8"}, {"lora": "adapter"}):
        with pytest.raises(ConfigError, match="with a loaded model, legal is none"):
            Engine(config_of(path, **options), load_dense(path))


def test_rejects_keeping_groups_that_are_not_what_the_options_say(tmp_path):
    made = write_repository(tmp_path, "llama", gptq(32, is_shuffled=True), GPTQ)
    assert load_dense(made.path) is not None
    with pytest.raises(ConfigError, match="g_idx names groups that are no neighbours, though desc_act is false"):
        load_model(made.path, torch.float32, show_progress=False, quantization="keep")


@pytest.mark.processes
def test_worker_processes_keep_the_same_weights(kept):
    """Every process reads the files by itself."""
    repository, references = kept("gptq")
    check(repository.path, references, "pass_q", quantization="keep", executor="processes")
