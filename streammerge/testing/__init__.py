"""The laws that every method, statistic and input format obeys, for authors to run with one call.

>>> from streammerge.testing import check_method
>>> check_method("linear", peak=False)  # doctest: +SKIP

Each function raises AssertionError with the law that is broken, where it shows, and the cure; it needs no test runner.
"""

from streammerge.testing.methods import check_method

__all__ = ["check_method"]
