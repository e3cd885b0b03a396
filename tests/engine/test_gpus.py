"""Ranks on GPUs, as far as a CPU can tell: what is chosen, what is refused, and with which numbers."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace
from tiny_models import load_reference, tiny_model

from longspan.attention import select
from longspan.attention.latent import LatentBackend
from longspan.attention.select import make_backend
from longspan.config import EngineConfig
from longspan.engine import gpus, ranks
from longspan.engine.engine import Engine
from longspan.engine.gpus import GPU, ask_pytorch, choose_device, find_gpus
from longspan.engine.memory import CONTEXT_BYTES, gpu_cache_memory
from longspan.engine.processes import worker_environment
from longspan.errors import ConfigError, UnsupportedModelError
from longspan.group.shape import GroupShape, speaker
from longspan.kv.layout import KVComponent, KVGroup, KVLayout, KVSpec
from longspan.models.compiled import compile_dense_
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config
from longspan.types import AttentionParams, ModelSpec
from longspan.worker.device import check_capability, check_memory, device_backend, process_device

GIB = 2**30
H200 = GPU("NVIDIA H200", (9, 0), 140 * GIB)


def config(**options):
    return EngineConfig(model="recall", **options)


def spec_of(width=64, dtype="bfloat16", weight_bytes=16 * GIB, softcap=None, window=None):
    group = KVGroup((0,), KVSpec.uniform(8, width, width, dtype, window), 32)
    params = AttentionParams(1.0, softcap, window)
    return ModelSpec("Llama", 1, 1000, None, (), (group,), (params,), weight_bytes=weight_bytes)


@pytest.fixture
def visible(monkeypatch):
    """`visible(2)` makes PyTorch see two GPUs; returns which one is the current one."""
    current = []

    def see(count, capability=(9, 0)):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        found = [GPU("NVIDIA H200", capability, 140 * GIB)] * count
        monkeypatch.setattr(gpus, "find_gpus", lambda: list(found))
        return current

    return see


def device_of_rank(config, rank, environment):
    return process_device(config, GroupShape.of(config), speaker(rank), environment)


def device_of(**options):
    return choose_device(config(**options))[0]


def test_auto_is_the_machines_gpus_and_else_the_cpu(visible):
    assert device_of() == "cpu"
    visible(2)
    assert choose_device(config(context_parallel_size=2)) == ("cuda", [H200, H200])
    assert choose_device(config(executor="threads", context_parallel_size=8)) == ("cuda", [H200])
    assert device_of(device="cpu") == "cpu"
    assert device_of(executor="ray") == "cpu", "where its workers are is not known here"
    assert device_of(executor="ray", device="cuda") == "cuda"
    visible(0)
    assert device_of() == "cpu"


def test_auto_takes_the_cpu_where_gpus_are_too_few_or_too_old_or_the_config_needs_it(visible):
    visible(1)
    assert device_of(context_parallel_size=2) == "cpu"
    for needs_it in (
        {"attention_backend": "cpu"},
        {"check_messages": True},
        {"measure": "again"},
        {"simulated_links": "nodes=0 latency_us=5 mbit_per_s=10"},
    ):
        assert device_of(**needs_it) == "cpu", needs_it
    visible(1, capability=(7, 5))
    assert device_of() == "cpu"


def test_a_loaded_model_says_where_ranks_compute(visible):
    visible(1)
    model = torch.nn.Linear(2, 2)
    assert choose_device(config(executor="threads"), model) == ("cpu", [])
    with pytest.raises(ConfigError, match="device: got 'cuda' with a model on 'cpu', legal is the model's"):
        choose_device(config(executor="threads", device="cuda"), model)


def test_auto_takes_the_cpu_where_gpus_cannot_be_looked_at(visible, monkeypatch):
    visible(1)

    def fail():
        raise ConfigError("device: got 'cuda', whose GPUs cannot be used")

    monkeypatch.setattr(gpus, "find_gpus", fail)
    assert device_of() == "cpu"


def test_rejects_cuda_without_a_gpu_or_a_build_for_it(visible):
    with pytest.raises(ConfigError, match=r"device: got 'cuda' with PyTorch .*, a build for CPUs, legal is cpu"):
        device_of(device="cuda")
    visible(0)
    with pytest.raises(ConfigError, match="device: got 'cuda' on a machine where PyTorch sees no usable GPU"):
        device_of(device="cuda")
    with pytest.raises(ConfigError, match="PyTorch sees no GPU"):
        device_of_rank(config(device="cuda"), 0, {})


def test_measuring_is_for_cpus(longspan):
    outcome = longspan("topology", "recall", "--context-parallel-size", "2", "--device", "cuda")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "device: got 'cuda', legal is auto or cpu" in outcome.err


def test_the_command_says_so(longspan):
    outcome = longspan("generate", "recall", "--device", "cuda", "--prompt", "a")
    assert outcome.code == 2
    assert "device: got 'cuda'" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device: got 'gpu'"),
        ({"device": "cpu", "dtype": "float16"}, "dtype: got 'float16'"),
        ({"device": "cuda", "measure": "again"}, "measure: got 'again'"),
        ({"device": "cuda", "check_messages": True}, "check_messages: got true"),
        (
            {"device": "cuda", "context_parallel_size": 2, "simulated_links": "nodes=0,1 latency_us=5 mbit_per_s=10"},
            "simulated_links: got some",
        ),
        ({"device": "cpu", "compile_dense": True}, "compile_dense: got true"),
        ({"cuda_graphs": "always"}, "cuda_graphs: got 'always'"),
    ],
)
def test_rejects_options_that_a_device_does_not_honour(options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_ranks_of_a_machine_take_its_gpus_in_order(visible):
    current = visible(4)
    processes = config(device="cuda", context_parallel_size=4)
    assert [device_of_rank(processes, rank, {}).index for rank in range(4)] == [0, 1, 2, 3]
    assert [device.index for device in current] == [0, 1, 2, 3]
    external = config(device="cuda", context_parallel_size=8, executor="external", listen="127.0.0.1:5000")
    assert device_of_rank(external, 6, {"LOCAL_RANK": "2"}).index == 2
    assert device_of_rank(config(device="cuda", executor="ray", context_parallel_size=8), 6, {}).index == 0
    assert device_of_rank(config(device="cuda", executor="threads", context_parallel_size=8), 6, {}).index == 0
    assert device_of_rank(config(device="cpu"), 0, {}).type == "cpu"
    two_each = GroupShape(num_ranks=2, processes_per_rank=2)
    indices = [process_device(processes, two_each, process, {}).index for process in two_each.processes]
    assert indices == [0, 1, 2, 3], "a process has a device of its own, and peers of a rank adjacent ones"


def test_rejects_more_ranks_than_gpus_and_old_gpus(visible):
    visible(2)
    with pytest.raises(
        ConfigError, match="context_parallel_size: got 3 with 2 GPUs, legal is one rank for each at most"
    ):
        device_of(device="cuda", context_parallel_size=3)
    external = config(device="cuda", context_parallel_size=3, executor="external", listen="127.0.0.1:5000")
    with pytest.raises(ConfigError, match="LOCAL_RANK: got 2 with 2 GPUs in sight of rank 2, legal is less"):
        device_of_rank(external, 2, {"LOCAL_RANK": "2"})
    with pytest.raises(ConfigError, match="context_parallel_size: got 3 with 2 GPUs in sight of rank 2"):
        device_of_rank(config(device="cuda", context_parallel_size=3), 2, {})
    visible(1, capability=(7, 5))
    with pytest.raises(ConfigError, match=r"device: got NVIDIA H200 of compute capability 7\.5"):
        device_of(device="cuda")
    with pytest.raises(ConfigError, match=r"device: got NVIDIA H200 of compute capability 7\.5, legal is 8\.0 or"):
        device_of_rank(config(device="cuda"), 0, {})
    check_capability("A100", (8, 0))


@pytest.mark.cover
def test_looks_at_gpus_in_a_process_of_its_own():
    assert find_gpus() == []  # what the real script says here
    assert ask_pytorch("print('a warning'); print('[[\"H\", [9, 0], 5]]')") == [GPU("H", (9, 0), 5)]
    with pytest.raises(ConfigError, match=r"device: got 'cuda', whose GPUs cannot be used \(RuntimeError: no driver\)"):
        ask_pytorch("raise RuntimeError('no driver')")


def test_gpus_that_do_not_answer_are_refused(monkeypatch):
    monkeypatch.setattr(gpus, "LOOK_S", 0.2)
    with pytest.raises(ConfigError, match=r"did not answer within 0\.2 s"):
        ask_pytorch("import time; time.sleep(60)")


def test_kv_takes_what_a_gpu_has_left_beside_weights_and_a_step():
    both = [H200, GPU("H", (9, 0), 100 * GIB)]
    memory = gpu_cache_memory(None, both, spec_of(), 16 * GIB, 4096, 8192, 0.9)
    assert 0.9 * 100 * GIB - 16 * GIB - CONTEXT_BYTES - 2 * GIB < memory < 0.9 * 100 * GIB - 16 * GIB - CONTEXT_BYTES
    assert gpu_cache_memory(5 * GIB, [H200], spec_of(), 16 * GIB, 4096, 8192, 0.9) == 5 * GIB
    half = gpu_cache_memory(None, both, spec_of(), 16 * GIB, 4096, 8192, 0.5)
    assert memory - half == 40 * GIB


@pytest.mark.parametrize(
    ("asked", "weight_bytes", "message"),
    [
        (None, 140 * GIB, rf"kv_cache_memory: got none, legal is at most 0 bytes .* NVIDIA H200 has {140 * GIB} bytes"),
        (
            120 * GIB,
            16 * GIB,
            rf"kv_cache_memory: got {120 * GIB}, legal is at most \d+ bytes .* weights of {16 * GIB}",
        ),
    ],
)
def test_rejects_memory_that_is_not_there_with_numbers(asked, weight_bytes, message):
    with pytest.raises(ConfigError, match=message):
        gpu_cache_memory(asked, [H200], spec_of(), weight_bytes, 4096, 8192, 0.9)


def test_an_engine_cuts_a_gpus_memory_into_ranks_and_pages(visible, monkeypatch):
    visible(2)
    seen = []

    def start_executor(start, *_):
        seen.append((start.config.device, start.config.kv_cache_memory, start.spec.kv_groups[0].spec.compute_dtype))
        return SimpleNamespace(hosts=())

    monkeypatch.setattr(ranks, "start_executor", start_executor)
    model = tiny_model("llama").path
    Engine(EngineConfig(model=model, context_parallel_size=2))
    Engine(EngineConfig(model=model, context_parallel_size=4, executor="threads", device="cuda", dtype="float32"))
    (device, whole, dtype), (_, quarter, _) = seen
    assert (device, dtype) == ("cuda", "bfloat16")
    assert 0.9 * 140 * GIB - 2 * CONTEXT_BYTES < whole < 0.9 * 140 * GIB - CONTEXT_BYTES
    assert whole // 5 < quarter < whole // 4
    remote = {"executor": "external", "listen": "127.0.0.1:5000", "device": "cuda", "context_parallel_size": 2}
    with pytest.raises(ConfigError, match="kv_cache_memory: got none with executor 'external' and device 'cuda'"):
        Engine(EngineConfig(model=model, **remote))


def test_a_rank_checks_its_own_gpus_memory_before_it_loads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (17 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    device = torch.device("cuda", 0)
    check_memory(spec_of(), 16 * GIB, (100,), 64, device)
    with pytest.raises(
        ConfigError, match=rf"weights of {16 * GIB} bytes, legal is what fits into the {17 * GIB} bytes"
    ):
        check_memory(spec_of(), 16 * GIB, (10**6,), 64, device)
    check_memory(spec_of(), 16 * GIB, (10**6,), 64, torch.device("cpu"))
    check_memory(spec_of(), 0, (4000,), 64, device)  # with weights that are there already


def test_rejects_a_model_that_the_kernels_do_not_take():
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"legal is one that takes the model \(head size: got 8"):
        device_backend(config(attention_backend="triton"), spec_of(width=8), cpu)
    assert device_backend(config(attention_backend="triton"), spec_of(width=96), cpu).name == "triton"
    with pytest.raises(ConfigError, match="dtype: got float16, the cpu backend takes"):
        device_backend(config(), spec_of(dtype="float16"), cpu)


@pytest.mark.parametrize(
    "layout",
    [
        KVLayout((KVComponent("k", 8, 64, "bfloat16"), KVComponent("v", 8, 64, "float32"))),
        KVLayout((KVComponent("k", 8, 64, "bfloat16", "float32"), KVComponent("v", 8, 64, "bfloat16", "float32"))),
        KVLayout((KVComponent("k", 8, 64, "int8"), KVComponent("v", 8, 64, "int8"))),
    ],
    ids=["mixed dtypes", "scales", "no scales"],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rejects_keys_and_values_that_no_kernel_reads_as_they_are_stored(layout, backend):
    spec = spec_of()
    group = replace(spec.kv_groups[0], spec=KVSpec(layout, "bfloat16"))
    with pytest.raises(UnsupportedModelError, match=r"as KVLayout\(.*, legal is one dtype, with scales"):
        device_backend(config(attention_backend=backend), replace(spec, kv_groups=(group,)), torch.device("cpu"))


def test_a_model_of_latents_gets_a_backend_that_projects_them():
    spec = spec_of()
    group = replace(spec.kv_groups[0], spec=KVSpec.latents(512, 64, 192, 128, "bfloat16"))
    backend = device_backend(config(), replace(spec, kv_groups=(group,)), torch.device("cpu"))
    assert isinstance(backend, LatentBackend)
    assert backend.name == "cpu"
    assert not isinstance(device_backend(config(), spec, torch.device("cpu")), LatentBackend)


def test_backends_of_a_gpu(monkeypatch):
    assert make_backend("auto", "cuda").name == make_backend("triton", "cuda:1").name == "triton"
    assert make_backend("torch", "cuda").name == "torch"
    with pytest.raises(
        ConfigError, match=r"'flashinfer', which is not installed, legal is pip install 'longspan\[flash"
    ):
        make_backend("flashinfer", "cuda")
    monkeypatch.setattr(select, "_is_installed", lambda module: False)
    assert make_backend("auto", "cuda").name == "torch"
    with pytest.raises(ConfigError, match="got 'triton' without Triton, legal is torch"):
        make_backend("triton", "cuda")


def test_the_triton_backend_needs_a_gpu_or_its_interpreter(monkeypatch):
    from longspan.triton_kernels import launch

    assert make_backend("triton", "cpu").name == "triton"
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        make_backend("triton", "cpu")


@pytest.mark.cover
def test_weight_bytes_count_every_weight_once():
    model = tiny_model("llama-one-kv-head")  # with tied embeddings
    spec = inspect_model(load_config(model.path)[0], None, torch.float32)
    assert spec.weight_bytes == sum(weight.nbytes for weight in model.module.parameters())


@pytest.mark.cover
@torch._dynamo.config.patch(recompile_limit=8)  # pytest would delete what is no plain attribute
def test_compiled_modules_compute_the_same_for_any_number_of_rows():
    model = copy.deepcopy(load_reference(tiny_model("llama").path))
    inputs = [torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (5, 3, 64)]
    layer = model.model.layers[1]
    want = [layer.mlp(layer.input_layernorm(x)) for x in inputs]
    model.model.layers[2].mlp.forward = model.model.layers[2].mlp.forward  # as `skip_unread_rows_` leaves it
    assert compile_dense_(model) == 3 * 2 + 1 + 2  # two norms a layer, the last one, and an MLP a layer but one
    assert torch._dynamo.config.recompile_limit >= 64, "a function with more graphs is not compiled any more"
    for x, expected in zip(inputs, want, strict=True):
        torch.testing.assert_close(layer.mlp(layer.input_layernorm(x)), expected)


def test_ranks_of_one_machine_talk_over_the_loopback_interface():
    assert {worker_environment(1)[f"{library}_SOCKET_IFNAME"] for library in ("GLOO", "NCCL")} == {"lo"}


@pytest.mark.cover
def test_the_parent_of_ranks_does_not_look_at_gpus():
    """CUDA does not survive a fork, so nothing that the parent imports may start it."""
    program = """
import torch
def refuse(*args, **kwargs):
    raise AssertionError("looked at a GPU")
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
import longspan.worker.serve
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert worker_environment(1)["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
