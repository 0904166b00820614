"""The laws that every method, statistic and input format obeys, for authors to run with one call.

>>> from streammerge.testing import check_method
>>> check_method("linear", peak=False)  # doctest: +SKIP

Each function raises AssertionError with the law that is broken, where it shows, and the cure; it needs no test runner.
"""

from streammerge.testing.formats import check_format
from streammerge.testing.methods import check_method
from streammerge.testing.statistics import check_statistic

__all__ = ["check_format", "check_method", "check_statistic"]
