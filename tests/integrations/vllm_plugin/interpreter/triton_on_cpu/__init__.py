"""Makes vLLM believe that Triton compiles for CPUs, so that its V2 model runner starts there.

With TRITON_INTERPRET=1 every kernel runs in Triton's interpreter, and neither compiler nor driver below is ever used.
Triton finds them by the entry point in the folder beside this one, when that folder's parent is on PYTHONPATH.
"""
