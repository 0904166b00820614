"""All built-in statistics in one namespace. A new statistic needs no entry here."""

from streammerge.statistics.asking import Steps, ask, ask_all
from streammerge.statistics.base import KINDS, Statistic
from streammerge.statistics.companions import FisherSquares, RegressionOperators, SquareTotal
from streammerge.statistics.counts import NonZero, SignTotal, Touched, Touches
from streammerge.statistics.describing import (
    Directions,
    Magnitudes,
    Moves,
    OwnSquares,
    SignAgreement,
    SignCounts,
)
from streammerge.statistics.orders import Order
from streammerge.statistics.random_words import LowWords
from streammerge.statistics.ranks import Band, Largest, Quantile, Threshold, TopK
from streammerge.statistics.sums import AbsSum, ColumnDots, ColumnGram, Dots, Gram, Squares, SquareSums
from streammerge.statistics.ties import TieIndex

__all__ = [
    "KINDS",
    "AbsSum",
    "Band",
    "ColumnDots",
    "ColumnGram",
    "Directions",
    "Dots",
    "FisherSquares",
    "Gram",
    "Largest",
    "LowWords",
    "Magnitudes",
    "Moves",
    "NonZero",
    "Order",
    "OwnSquares",
    "Quantile",
    "RegressionOperators",
    "SignAgreement",
    "SignCounts",
    "SignTotal",
    "SquareSums",
    "SquareTotal",
    "Squares",
    "Statistic",
    "Steps",
    "Threshold",
    "TieIndex",
    "TopK",
    "Touched",
    "Touches",
    "ask",
    "ask_all",
]
