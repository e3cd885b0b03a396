"""How much of the time on the wire hides behind computing, strategy by strategy.

    python benchmarks/overlap.py [--length 8192] [--wire 0.4] [--repeats 3] [--json] [--save]

Two ranks x 1 thread prefill a prompt, first over the machine's own links, then as two nodes whose simulated link
(`simulated_links`) is so slow that the bytes of the busiest rank take `--wire` times the first run's time. With no
overlap the second run would take that much longer; what it does not take longer has been hidden. The bytes are those
that the ranks counted; nothing that travels in both runs is slower for another reason than the simulated link.
"""

from pathlib import Path
from typing import Any

from common import LongspanRunner, median, parser, random_model, random_prompt, report

STRATEGIES = ("gather_kv", "pass_kv", "pass_q")


def prefill_s(runner: LongspanRunner, length: int, seed: int) -> tuple[float, int]:
    """Time to the first token, and the bytes that the busiest rank sent for it."""
    before = [stats.bytes_sent for stats in runner.engine.rank_stats()]
    ttft_s = runner.run(random_prompt(length, seed), 1).ttft_s
    return ttft_s, max(s.bytes_sent - b for s, b in zip(runner.engine.rank_stats(), before, strict=True))


def measure(model: Path, strategy: str, length: int, wire: float, repeats: int) -> dict[str, Any]:
    """One strategy: plain and slow link in turns."""
    options = {"placement": "striped", "strategy": strategy, "enable_prefix_caching": False}
    plain = LongspanRunner(model, 2, 1, **options)
    first_s, num_bytes = prefill_s(plain, length, 0)
    mbit_per_s = round(num_bytes * 8 / 1e6 / (wire * first_s), 1)
    slow = LongspanRunner(model, 2, 1, simulated_links=f"nodes=0,1 mbit_per_s={mbit_per_s}", **options)
    pairs = [(prefill_s(plain, length, seed)[0], prefill_s(slow, length, seed)[0]) for seed in range(1, repeats + 1)]
    plain.close()
    slow.close()
    wire_s = num_bytes * 8 / 1e6 / mbit_per_s
    return {
        "strategy": strategy,
        "MB sent by a rank": num_bytes / 1e6,
        "link Mbit/s": mbit_per_s,
        "on the wire, s": wire_s,
        "plain, s": median(a for a, _ in pairs),
        "slow link, s": median(b for _, b in pairs),
        "hidden": f"{median(1 - (b - a) / wire_s for a, b in pairs):.0%}",
    }


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(length=8192)
    options.add_argument("--wire", type=float, default=0.4, help="time on the wire, as a share of the plain run's")
    chosen = options.parse_args()
    with random_model() as model:
        rows = [measure(model, s, chosen.length, chosen.wire, chosen.repeats) for s in STRATEGIES]
    report("overlap", rows, {"prompt tokens": chosen.length, "wire / plain": chosen.wire}, chosen)


if __name__ == "__main__":
    main()
