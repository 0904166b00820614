"""The old name of `streammerge.algebra.rules`, kept for one version: a recipe is now called a rule."""

from streammerge.algebra import extent, rules
from streammerge.methods.renamed import finder

__getattr__ = finder(__name__, (rules, extent), {"Recipe": "Rule", "Sees": "Extent"})
