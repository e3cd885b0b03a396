"""llama.cpp on the same weights, through the C functions of llama-cpp-python, one prompt at a time.

Runs in llama.cpp's environment.
Read next: `protocol.py`; `gguf_file.py`.
"""

import ctypes
from typing import Any

from protocol import Stopwatch, serve


def import_all() -> None:
    import llama_cpp  # noqa: F401
    import numpy  # noqa: F401


class LlamaCppEngine:
    def __init__(self, options: dict[str, Any]) -> None:
        import llama_cpp as c
        import numpy

        self._c, self._numpy = c, numpy
        c.llama_backend_init()
        parameters = c.llama_model_default_params()
        self._model = c.llama_model_load_from_file(options["model"].encode(), parameters)
        context = c.llama_context_default_params()
        context.n_ctx = options["context_len"]
        context.n_threads = context.n_threads_batch = options["num_threads"]
        context.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context.type_k = context.type_v = {"f16": c.GGML_TYPE_F16, "f32": c.GGML_TYPE_F32}[options["kv"]]
        context.n_batch = options.get("n_batch", context.n_batch)
        context.n_ubatch = options.get("n_ubatch", context.n_ubatch)
        self._context = c.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context of {options}")
        self._batch_len = int(c.llama_n_batch(self._context))
        self._vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self.facts = {"version": c.__version__, "n_batch": self._batch_len, "n_ubatch": int(context.n_ubatch)}
        self.facts["system"] = c.llama_print_system_info().decode()

    def run(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        stopwatch, token_ids = Stopwatch(), []
        for first in range(0, len(prompt), self._batch_len):
            self._decode(prompt[first : first + self._batch_len])
        while len(token_ids) < num_tokens:
            if token_ids:
                self._decode(token_ids[-1:])
            logits = self._c.llama_get_logits_ith(self._context, -1)
            token_ids.append(int(self._numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()))
            stopwatch.token()
        return stopwatch.answer(token_ids)

    def _decode(self, token_ids: list[int]) -> None:
        array = (ctypes.c_int32 * len(token_ids))(*token_ids)
        status = self._c.llama_decode(self._context, self._c.llama_batch_get_one(array, len(token_ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def close(self) -> None:
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)


if __name__ == "__main__":
    serve(import_all, LlamaCppEngine)
