"""The command line: a thin shell over `streammerge.api`.

Heavy imports happen inside the commands, so that ``--help`` and a config error answer at once.
"""

from streammerge.cli.entry import cli, main

__all__ = ["cli", "main"]
