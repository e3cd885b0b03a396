"""Runs vLLM's V2 model runner on a CPU, in Triton's interpreter.

Reads names of files from standard input, a line each, and answers with an exit status. A file is JSON: `arguments` of
`vllm.LLM`, and `runs` of `prompts` (token ids), sampling `params` and `one_by_one`. What came out replaces it.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

from forking import forking

ASYNC = "LONGSPAN_TEST_ASYNC"
"""Read by `interpreter/triton_on_cpu/plugin.py`."""


def num_bytes(worker):
    """Bytes that attention has sent to other ranks, in one worker; None without context parallelism."""
    manager = worker.worker.model_runner.pcp_manager
    return None if manager is None else manager.messages.num_bytes


def run(llm, asked):
    """The outputs of one run, as JSON can hold them."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = dict(asked["params"])
    if "json" in params:
        params["structured_outputs"] = StructuredOutputsParams(json=params.pop("json"))
    if "logit_bias" in params:
        params["logit_bias"] = {int(token_id): bias for token_id, bias in params["logit_bias"].items()}
    params = SamplingParams(**params)
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    batches = [[prompt] for prompt in prompts] if asked["one_by_one"] else [prompts]
    outputs = [output for batch in batches for output in llm.generate(batch, params, use_tqdm=False)]
    return [
        {
            "tokens": [list(one.token_ids) for one in output.outputs],
            "logprobs": values(output.outputs[0].logprobs),
            "prompt_logprobs": values((output.prompt_logprobs or [])[1:]),
        }
        for output in outputs
    ]


def values(logprobs):
    """Per token, the log-probabilities in descending order."""
    return [sorted((entry.logprob for entry in found.values()), reverse=True) for found in logprobs or []]


def main(path):
    """Run one file."""
    import vllm

    spec = json.loads(path.read_text())
    if spec["arguments"]["async_scheduling"]:
        os.environ[ASYNC] = "1"
    llm = vllm.LLM(**spec["arguments"])
    config = llm.llm_engine.vllm_config
    try:
        found = {"runs": [run(llm, asked) for asked in spec["runs"]]}
        metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        found |= {
            "is_v2": config.use_v2_model_runner,
            "is_async": config.scheduler_config.async_scheduling,
            "num_blocks": config.cache_config.num_gpu_blocks,
            "num_bytes": llm.collective_rpc(num_bytes),
            "hits": metrics["vllm:prefix_cache_hits"],
            "preemptions": metrics["vllm:num_preemptions"],
        }
    finally:
        llm.llm_engine.engine_core.shutdown()
    path.write_text(json.dumps(found))


def serve():
    """Answer every line by a copy of this process, which has imported vLLM."""
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # what vLLM prints is no answer
    with forking():
        for line in sys.stdin:
            process = multiprocessing.get_context("fork").Process(target=main, args=(Path(line.strip()),))
            process.start()
            process.join()
            print(process.exitcode, file=answers, flush=True)


if __name__ == "__main__":
    serve()
