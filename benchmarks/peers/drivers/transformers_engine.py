"""Transformers with the attention that it chooses and its default cache, one prompt at a time.

Read next: `protocol.py`.
"""

from typing import Any

from protocol import Stopwatch, serve


def import_all() -> None:
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401


class TransformersEngine:
    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(options["num_threads"])
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
        self.facts = {"version": transformers.__version__, "torch": torch.__version__}
        self.facts |= {
            "attention": self._model.config._attn_implementation,
            "experts": self._model.config._experts_implementation,
        }

    def run(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        import torch

        stopwatch, token_ids, cache, ids = Stopwatch(), [], None, prompt
        with torch.inference_mode():
            for _ in range(num_tokens):
                output = self._model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = output.past_key_values, [int(output.logits[0, -1].argmax())]
                token_ids += ids
                stopwatch.token()
        return stopwatch.answer(token_ids)

    def close(self) -> None:
        """Nothing to release."""


if __name__ == "__main__":
    serve(import_all, TransformersEngine)
