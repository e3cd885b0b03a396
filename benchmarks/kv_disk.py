"""First token of a prompt whose KV is on disk, against computing it; and what others notice of a large load.

    python benchmarks/kv_disk.py [--length 32768] [--repeats 3] [--load-bytes 1000000000] [--json] [--save]

The model of `common.py` (22.4 M parameters, float32), on two ranks of one thread. A prompt is computed by engines that
write nothing, and loaded by engines that start on a directory which an earlier engine has written: one start per
repeat, so every load is the first of its process. The operating system may still hold the files in memory; what a cold
disk adds is its own time per byte.

The second table: four short requests decode 200 tokens each, alone, and while a prompt with so many bytes of KV is
loaded. Its files hold random bytes, which take as long to load as others.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Timing, median, parser, random_model, random_prompt, report, run_request
from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.kv.page_directory import ModelPages, PageKey
from longspan.kv.prefix import extend_hashes
from longspan.types import SamplingParams

NUM_SHORT, SHORT_LEN, SHORT_TOKENS = 4, 200, 200


def open_engine(model: Path, directory: Path | None, num_ranks: int = 2) -> Engine:
    """An engine that has run something."""
    disk = None if directory is None else str(directory)
    config = EngineConfig(
        model=str(model), context_parallel_size=num_ranks, threads_per_rank=1, kv_disk=disk, max_step_ms=200
    )
    engine = Engine(config)
    run_request(engine, random_prompt(256, 99), 2)
    return engine


def flush(engine: Engine) -> None:
    """Wait for what is to be stored."""
    assert engine.tiers is not None
    tiers = engine.scheduler.memory.tiers
    assert tiers is not None
    engine.tiers.flush(engine.scheduler, engine.executor)
    while tiers.num_moving:
        engine.tiers.flush(engine.scheduler, engine.executor)


def first_tokens(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the first table."""
    prompt = random_prompt(options.length, 0)
    timings: dict[str, list[Timing]] = {"computed": [], "computed and stored": [], "loaded": [], "loaded by 1 rank": []}
    loaded_bytes = 0
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="longspan-kv-") as name:
            for way, directory, num_ranks in (
                ("computed", None, 2),
                ("computed and stored", Path(name), 2),
                ("loaded", Path(name), 2),
                ("loaded by 1 rank", Path(name), 1),
            ):
                engine = open_engine(model, directory, num_ranks)
                timings[way].append(run_request(engine, prompt, 8))
                if directory is not None:
                    flush(engine)
                    loaded_bytes = max(loaded_bytes, engine.stats().tiers["disk"].loaded_bytes)
                engine.close()
    first = median(one.ttft_s for one in timings["computed"])
    return [
        {
            "way": way,
            "ttft_s": median(one.ttft_s for one in own),
            "/ computed": median(one.ttft_s for one in own) / first,
            "same tokens": all(one.token_ids == timings["computed"][0].token_ids for one in own),
            "loaded, MB": loaded_bytes / 1e6 if way.startswith("loaded") else 0.0,
        }
        for way, own in timings.items()
    ]


def decode_beside(engine: Engine, seed: int, long: list[int] | None) -> list[float]:
    """Seconds between tokens of the short requests; a long prompt comes when they have begun."""
    params = SamplingParams(max_tokens=SHORT_TOKENS, ignore_eos=True)
    short = [engine.add_request(random_prompt(SHORT_LEN, seed + i), params) for i in range(NUM_SHORT)]
    last, gaps, is_added = dict.fromkeys(short, 0.0), list[float](), long is None
    while any(request.finish_reason is None for request in short):
        for request in engine.step():
            if request not in last:
                continue
            now = time.perf_counter()
            if request.num_generated > 10:
                gaps.append(now - last[request])
            last[request] = now
        if not is_added and all(request.num_generated > 20 for request in short):
            assert long is not None
            is_added = True
            late = engine.add_request(long, SamplingParams(max_tokens=1, ignore_eos=True))
    if long is not None:
        while late.finish_reason is None:
            engine.step()
        assert late.num_cached > len(long) - 32, "it was computed"
    return gaps


def beside_a_load(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the second table."""
    with tempfile.TemporaryDirectory(prefix="longspan-kv-") as name:
        engine = open_engine(model, Path(name))
        size, groups = engine.config.page_size, engine.spec.kv_groups
        long = random_prompt(int(options.load_bytes / sum(group.token_bytes for group in groups)), 7)
        hashes: list[bytes] = []
        extend_hashes(hashes, long, size)
        assert engine.tiers is not None
        assert engine.tiers.fingerprint is not None
        pages = ModelPages(Path(name), engine.tiers.fingerprint)
        for group_idx, group in enumerate(groups):
            page = memoryview(random.Random(0).randbytes(group.page_bytes(size)))
            for page_hash in hashes:
                pages.write(PageKey(group_idx, page_hash), page)
        engine.close()
        gaps: dict[str, list[float]] = {"none": [], "a load": []}
        load_s: list[float] = []
        for repeat in range(options.repeats):
            for way, prompt in (("none", None), ("a load", long)):
                engine = open_engine(model, Path(name))
                gaps[way] += decode_beside(engine, 100 * repeat, prompt)
                if prompt is not None:
                    load_s.append(engine.stats().tiers["disk"].load_s / 2)
                engine.close()
    rows: list[dict[str, Any]] = []
    for way, own in gaps.items():
        own.sort()
        p50, p99 = own[len(own) // 2], own[len(own) * 99 // 100]
        none = sorted(gaps["none"])
        rows.append(
            {
                "beside": way,
                "p50_ms": p50 * 1e3,
                "p99_ms": p99 * 1e3,
                "p99 / none": p99 / none[len(none) * 99 // 100],
                "load_s": median(load_s) if way != "none" else 0.0,
            }
        )
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--load-bytes", type=float, default=1e9, help="KV of the prompt that is loaded; 0: leave out")
    options.add_argument("--only-beside", action="store_true", help="leave the first table out")
    options.set_defaults(length=32768)
    chosen = options.parse_args()
    with random_model() as model:
        facts = {"prompt tokens": chosen.length, "ranks x threads": "2 x 1"}
        if not chosen.only_beside:
            report("kv-disk", first_tokens(model, chosen), facts, chosen)
        if chosen.load_bytes:
            report("kv-disk-beside", beside_a_load(model, chosen), {"loaded bytes": chosen.load_bytes}, chosen)


if __name__ == "__main__":
    main()
