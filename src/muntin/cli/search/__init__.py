"""`muntin search`."""

from muntin.cli.search.command import search_command

__all__ = ["search_command"]
