"""Parts of `benchmarks/compare.py`: engines in processes of their own, their environments, models, and goals.

Read next: `engines.py`, what is compared; `process.py`, how an engine is held; `drivers/`, what runs inside.
"""
