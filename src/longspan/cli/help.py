"""Help of commands: options in groups, what placements and strategies are, examples.

Holds the layout and these words. Must not know which command has which options.
Read next: `longspan.cli.options`, which makes the options.
"""

from typing import Any

import click

from longspan.option import Group


class GroupedOption(click.Option):
    """Option that help lists under the heading of its group."""

    def __init__(self, *args: Any, group: Group, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


PLACEMENTS = {
    "packed": "all pages of a request on one rank; nothing moves",
    "striped": "runs of pages go round the ranks in snake order (0, 1, 1, 0), which balances long prompts",
    "spill": "one rank, and the next when it is full",
    "auto": "packed if short, striped where that is predicted to be faster, or needed to fit",
}
STRATEGIES = {
    "local": "nothing moves: every key is where its queries are",
    "gather_kv": "all visible keys and values move, at once",
    "pass_kv": "keys and values go round a ring, in blocks",
    "pass_q": "queries go to the keys, and partial results come back",
    "tree": "as pass_q, but merged inside each node first",
    "auto": "in every step the one with the least predicted time (--explain says why)",
}


class GroupedCommand(click.Command):
    """Command whose help lists options in named groups, explains strategies, and ends with examples."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        """Make a command.

        Args:
            *args: as of `click.Command`.
            examples: command lines, one per line.
            **kwargs: as of `click.Command`.
        """
        super().__init__(*args, **kwargs)
        self._examples = examples.splitlines()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what strategies and placements are, if there are options for them, and the examples."""
        names = {parameter.name for parameter in self.get_params(ctx)}
        for option, words in (("placement", PLACEMENTS), ("strategy", STRATEGIES)):
            if option in names:
                with formatter.section(f"What --{option} may be"):
                    formatter.write_dl([*words.items()])
        if self._examples:
            with formatter.section("Examples"):
                for line in self._examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of the command itself first, then every group."""
        rows: dict[str, list[tuple[str, str]]] = {"Options": []}
        for group in Group:
            rows[f"Options: {group.value}"] = []
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue  # the usage line and the text above name it
            heading = f"Options: {parameter.group.value}" if isinstance(parameter, GroupedOption) else "Options"
            record = parameter.get_help_record(ctx)
            if record is not None:
                rows[heading].append(record)
        for heading, records in rows.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
