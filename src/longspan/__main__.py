"""Entry point of `python -m longspan`, which equals the `longspan` command."""

from longspan.cli.main import main

main()
