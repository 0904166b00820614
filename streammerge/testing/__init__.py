"""The laws that every method, statistic and input format must obey; authors check them with one call.

>>> from streammerge.testing import check_method
>>> check_method("linear", peak=False)  # doctest: +SKIP

Each function raises AssertionError with the broken law, the place and the cure. No test runner is needed.
"""

from streammerge.testing.formats import check_format
from streammerge.testing.methods import check_method
from streammerge.testing.statistics import check_statistic

__all__ = ["check_format", "check_method", "check_statistic"]
