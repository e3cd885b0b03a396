"""longspan with real worker processes and default options, one prompt at a time.

Read next: `protocol.py`; `LongspanRunner` in `benchmarks/common.py`.
"""

import sys
from pathlib import Path
from typing import Any

from protocol import serve


def import_all() -> None:
    """What a worker process imports, and not what the driver does."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import longspan.worker.process
    import longspan.worker.serve  # noqa: F401


class LongspanEngine:
    def __init__(self, options: dict[str, Any]) -> None:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        import torch

        import longspan
        from common import LongspanRunner
        from longspan.native import kernels

        config = options.get("config", {})
        self._runner = LongspanRunner(Path(options["model"]), options["num_ranks"], options["num_threads"], **config)
        self.facts = {"torch": torch.__version__, "compiled kernels": kernels.is_available()}
        self.facts["version"] = getattr(longspan, "__version__", "of this checkout")

    def run(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        timing = self._runner.run(prompt, num_tokens)
        return {
            "ttft_s": timing.ttft_s,
            "tpot_s": timing.tpot_s if num_tokens > 1 else None,
            "token_ids": timing.token_ids,
            "num_cached": timing.num_cached,
        }

    def close(self) -> None:
        self._runner.close()


if __name__ == "__main__":
    serve(import_all, LongspanEngine)
