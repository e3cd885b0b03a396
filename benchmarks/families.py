"""Mixtures of experts, sinks, chunks and latents beside peers: `compare.py` with a model of each family.

    python benchmarks/families.py [--models moe,gpt_oss,llama4,latent] [--lengths 8192,16384] [--peers ...] [--json]

All options are those of `compare.py`. A token meets about 100 M weights of each model (`peers/models.py`); longspan
with one rank on one core tells what the second rank brings.
"""

import sys

import compare

if __name__ == "__main__":
    sys.exit(compare.main(["--models", "moe,gpt_oss,llama4,latent", "--lengths", "8192,16384", *sys.argv[1:]]))
