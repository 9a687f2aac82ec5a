"""A command, called in this process."""

from lorsa_utils.kit import cli


def lorsa(*arguments: object) -> int:
    """The exit code."""
    return cli.main([str(argument) for argument in arguments])
