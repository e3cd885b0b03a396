"""longspan: exact context parallelism for LLM inference."""
