"""Writes a GGUF file in 4 bits: `gguf_quantize.py FILE OUT`, in Q4_0 with llama.cpp's own function.

Runs in llama.cpp's environment.
"""

import sys

import llama_cpp as c


def quantize(file: str, out: str) -> None:
    """Raises: RuntimeError, with llama.cpp's status."""
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype = c.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.output_tensor_type = parameters.token_embedding_type = c.GGML_TYPE_Q4_0  # else 6 bits
    if status := c.llama_model_quantize(file.encode(), out.encode(), parameters):
        raise RuntimeError(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    quantize(sys.argv[1], sys.argv[2])
