"""Runs vLLM's V2 model runner: starts `v2_engine.py`, where vLLM finds a Triton for CPUs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from engines import OPTIONS

HERE = Path(__file__).parent


def greedy(prompts, one_by_one=False, **params):
    """A run of `v2_engine.py`."""
    params = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **params}
    return {"prompts": prompts, "params": params, "one_by_one": one_by_one}


class V2Server:
    """A process that has imported vLLM beside Triton's interpreter, and starts engines when asked."""

    def __init__(self):
        paths = [str(HERE / "interpreter"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        changed = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TRITON_INTERPRET": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for `num_bytes`, which is sent to workers
        }
        # A test of this process may have chosen vLLM's V1 runner.
        env = {name: value for name, value in os.environ.items() if name != "VLLM_USE_V2_MODEL_RUNNER"} | changed
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, str(HERE / "v2_engine.py")]
        self._process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def run(self, directory, model, num_ranks, runs, longspan=None, is_async=False, **options):
        """What an engine with `num_ranks` gives for `runs`; 1 is vLLM alone."""
        arguments = {
            "model": model,
            "dtype": "float32",
            "max_model_len": 4096,
            "kv_cache_memory_bytes": 16 << 20,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 16,
            "block_size": 32,
            "disable_log_stats": False,
            "enforce_eager": True,
            "async_scheduling": is_async,
            **options,
        }
        if num_ranks > 1:
            arguments["prefill_context_parallel_size"] = num_ranks
            arguments["additional_config"] = {"longspan": {**OPTIONS, **(longspan or {})}}
        path = Path(directory) / "engine.json"
        path.write_text(json.dumps({"arguments": arguments, "runs": runs}))
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "0\n", "the engine failed; its output is in the message of the test"
        found = json.loads(path.read_text())
        assert found["is_v2"]
        assert found["is_async"] == is_async
        return found


def tokens_of(run):
    """Token ids of the first continuation of each prompt."""
    return [output["tokens"][0] for output in run]
