"""Runs a command of mergekit for every line of standard input, in mergekit's own environment and one process.

The command's module is the argument: ``run_yaml`` or ``moe``. A line is a JSON list of arguments; the answer is one line,
``null`` or the error. Started by `compare_mergekit.py` and `compare_moe.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import sys
import warnings


def main() -> None:
    """Answer until the input ends."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    command = importlib.import_module(f"mergekit.scripts.{sys.argv[1]}").main
    for line in sys.stdin:
        error = None
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                command(json.loads(line), standalone_mode=False)
            except BaseException as failure:
                error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()
