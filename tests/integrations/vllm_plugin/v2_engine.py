"""Runs vLLM's V2 model runner in a process of its own, on a CPU in Triton's interpreter: `python v2_engine.py FILE`.

FILE is JSON: `arguments` of `vllm.LLM`, and `runs` of `prompts` (token ids), sampling `params` and `one_by_one`. What
came out replaces it.
"""

import json
import sys
from pathlib import Path


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
    import vllm

    spec = json.loads(path.read_text())
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
