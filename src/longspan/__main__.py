"""`python -m longspan`: the same as the `longspan` command."""

from longspan.cli.main import main

main()
