"""A registered method: its function, its declarations, and the steps through its statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from typing import Any, Literal

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import Formula, Rule, removing, scaled
from streammerge.errors import InputError, blamed_on, printable
from streammerge.methods.drop import GENERAL, DropNames
from streammerge.methods.parameters import CONTEXT, Parameter
from streammerge.methods.sources import digest, imported_files, own_digest
from streammerge.methods.tensor_context import TensorContext
from streammerge.records import dataclass
from streammerge.statistics.asking import Steps, follow
from streammerge.statistics.base import Statistic

Base = Literal["required", "optional", "member", "template", "none"]
"""The role of ``base_model`` in a method.

`required`, `optional`: task vectors are differences from the base. `member`: the base is one more model, whether it is
listed or not. `template`: the arithmetic has no base; the base provides config.json, the tokenizer and the tensors
that are copied. `none`: a config with a base is refused. A drop before the method needs a base in every case.
"""


Workspace = int | Callable[[TensorContext], int]
"""Bytes per element of a block, or a function that returns the bytes for any block of a tensor."""

SCALE = "lambda"
"""The parameter that is the factor of the merged task vector, in every method that has one."""
LAYER_SCALE = "lines"
"""A factor of the merged task vector that the planner adds to a tensor's parameters, for a method that has none."""
DISTRIBUTIONS: dict[str, str] = {}
"""The identity of each installed package that provides methods, by the package's name."""


@dataclass(frozen=True)
class Method:
    """A registered method: its function, and everything that the planner must know about it."""

    name: str
    function: Callable[..., Any]
    access: Extent
    """The largest extent that any choice of parameters needs; `access_with` returns that of a given choice."""
    base: Base
    n_models: tuple[int, int | None]
    parameters: Mapping[str, Parameter]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    drop: DropNames = GENERAL
    """The names of the parameters of the drop before the method."""
    fisher: bool = False
    """Whether each model comes with a Fisher diagonal."""
    gram: bool = False
    """Whether each model comes with Gram matrices."""
    matrices: bool = False
    """Whether it merges whole matrices, one at a time, and all other tensors in a different way."""
    workspace: Workspace = 0
    """Bytes that a formula holds at once in addition to what every formula may hold."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Parameters of mergekit that have no numeric effect here, each with the reason."""
    paper: str = ""
    origin: str = "built in"
    text: str = ""
    """A description for users."""
    cost: float | None = None
    """Core seconds per GB of inputs on CPUs, by compiled kernels if it has some; None: unknown.

    Those of the built-in methods are measured by tools/measure/method_costs.py, with typical parameters.
    """

    @property
    def summary(self) -> str:
        """The first line of the description."""
        return self.text.split("\n", 1)[0]

    @property
    def fingerprint(self) -> str:
        """The name; of a user's method together with a digest of its source."""
        if self.origin == "built in":
            return self.name
        package = DISTRIBUTIONS.get(self.function.__module__.partition(".")[0], "")
        return " ".join(filter(None, (self.name, own_digest(self.function), package)))

    @property
    def identity(self) -> dict[str, str]:
        """The digests of the method's code by name: its own and, for a user's method, of all local modules it imports."""
        if self.origin == "built in":
            return {"method": self.fingerprint}
        modules = {
            f"method module {name}": digest(path.read_bytes())
            for name, path in imported_files(self.function).items()
        }
        return {"method": self.fingerprint, **modules}

    @cached_property
    def known_rules(self) -> dict[tuple[object, ...], type[Rule]]:
        """The rules that the method is known to choose, by the key that jobs share. The planner fills it."""
        return {}

    @cached_property
    def known_fused(self) -> dict[tuple[object, ...], str | None]:
        """Why a device does not compute all of the method (None: it does), by the key that jobs share. The planner fills it."""
        return {}

    @property
    def has_task_vectors(self) -> bool:
        """Whether its result is the base plus a merged task vector, if there is a base."""
        return self.base in ("required", "optional")

    @property
    def scales(self) -> bool:
        """Whether it has a factor of the merged task vector, `lambda`."""
        return self.base == "required" and SCALE in self.parameters

    @cached_property
    def is_formula(self) -> bool:
        """Whether the function is a plain formula of tensors."""
        return "models" in inspect.signature(self.function).parameters

    @cached_property
    def takes_context(self) -> bool:
        """Whether a plain formula takes the `TensorContext`."""
        return self.is_formula and CONTEXT in inspect.signature(self.function).parameters

    @property
    def looks_at_names(self) -> bool:
        """Whether the method may ask for different statistics for different tensors with the same parameters."""
        return not self.is_formula and self.origin != "built in"

    def workspace_bytes(self, context: TensorContext, n: int) -> int:
        """Return the workspace in bytes that the method declares for a block of `n` elements of a tensor.

        Raises
        ------
        InputError
            If the declared value is not a number of bytes.
        """
        if self.matrices and context.matrix is None:
            return 0
        if not callable(self.workspace):
            return self.workspace * n
        with blamed_on(self.name, context.name):
            nbytes = self.workspace(context)
        if not isinstance(nbytes, int) or nbytes < 0:
            raise InputError(
                f"method {printable(self.name)!r}: workspace(context) returned {printable(nbytes)} for tensor "
                f"{printable(context.name)}; return a number of bytes, an int of 0 or more"
            )
        return nbytes

    def start(
        self, context: TensorContext, parameters: Mapping[str, Any], answers: Sequence[Sequence[Any]]
    ) -> Rule | list[Statistic[Any]]:
        """Send the method the `answers` known so far; return the statistics it asks for next, or its rule."""
        if self.origin == "built in":
            return follow(self._steps(context, parameters), answers)
        with blamed_on(self.name, context.name):
            return follow(self._steps(context, parameters), answers)

    def _steps(self, context: TensorContext, parameters: Mapping[str, Any]) -> Steps[Rule]:
        """Run the method, and scale its result if the planner asks for it."""
        own = dict(parameters)
        factor = own.pop(LAYER_SCALE, 1.0)
        rule = yield from self._own_steps(context, own)
        return rule if factor == 1.0 else scaled(rule, factor)

    def _own_steps(self, context: TensorContext, own: dict[str, Any]) -> Steps[Rule]:
        """Run the drop, if the parameters ask for one, and then the method."""
        drop = self.drop.take(own)
        if drop is not None:
            dropped = tuple((yield from drop.steps()))
            context = replace(context, dropped=dropped, rescaled_by_norm=drop.rescale == "l1")
        keywords = {self.parameters[name].python_name: value for name, value in own.items()}
        if self.is_formula:
            if self.takes_context:
                keywords[CONTEXT] = context
            return Formula(self.function, keywords, context.dropped, self.name)
        result: Any = self.function(context, **keywords)
        return (yield from result) if inspect.isgenerator(result) else result

    def drops(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether these parameters put a drop before the method."""
        return self.drop.wanted_by(parameters)

    def draws(self, context: TensorContext, parameters: Mapping[str, Any]) -> bool:
        """Return whether each model draws its own random words with these parameters."""
        rule = self.rule(context, parameters)
        return any(vector.is_random and not vector.shared for vector in removing(rule))

    def sees(self, context: TensorContext, parameters: Mapping[str, Any]) -> Extent:
        """Return the extent that arithmetic with these parameters needs at once."""
        if self.is_formula:
            by_access: dict[Extent, Extent] = {Extent.ELEMENT: Extent.ELEMENT, Extent.ROW: Extent.ROW}
            return by_access.get(self.access, Extent.TENSOR)
        return self.rule(context, parameters).extent

    def rule(self, context: TensorContext, parameters: Mapping[str, Any]) -> Rule:
        """Return the rule that the method chooses for placeholder values of its statistics."""
        answers = [[statistic.placeholder() for statistic in one] for one in self.rounds(context, parameters)]
        rule = self.start(context, parameters, answers)
        assert not isinstance(rule, list)
        return rule

    def rounds(self, context: TensorContext, parameters: Mapping[str, Any]) -> list[list[Statistic[Any]]]:
        """Return the statistics that the method asks for in each round, given placeholder values."""
        answers: list[list[Any]] = []
        rounds: list[list[Statistic[Any]]] = []
        while isinstance(wanted := self.start(context, parameters, answers), list):
            rounds.append(wanted)
            answers.append([statistic.placeholder() for statistic in wanted])
        return rounds

    def access_with(self, context: TensorContext, parameters: Mapping[str, Any]) -> Extent:
        """Return the extent that these parameters need, statistics included."""
        if self.is_formula:
            return self.access
        extents = {
            statistic.extent for statistics in self.rounds(context, parameters) for statistic in statistics
        }
        if Extent.MODEL in extents:
            return Extent.MODEL
        if extents:
            return Extent.TENSOR
        return Extent.ROW if self.sees(context, parameters) == Extent.ROW else Extent.ELEMENT
