"""Runs mergekit-moe for every line of standard input, in mergekit's own environment and one process.

A line is a JSON list of arguments; the answer is one line, ``null`` or the error. Started by `compare_moe.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings


def main() -> None:
    """Answer until the input ends."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from mergekit.scripts.moe import main as mergekit_moe

    for line in sys.stdin:
        error = None
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                mergekit_moe(json.loads(line), standalone_mode=False)
            except BaseException as failure:
                error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()
