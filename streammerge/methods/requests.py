"""The old name of `streammerge.statistics`, kept for one version: a request is now called a statistic."""

from streammerge.algebra import extent, rules
from streammerge.methods.renamed import finder
from streammerge.statistics import kinds

__getattr__ = finder(
    __name__,
    (kinds, rules, extent),
    {"Request": "Statistic", "Scope": "Extent", "Mixing": "RegressionOperators"},
)
