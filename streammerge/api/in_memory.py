"""Merge models in memory: state dicts in, tensors out, without files."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from streammerge.api.deciding import settle
from streammerge.api.feedback import OnEvent, controlled
from streammerge.api.reading import ConfigLike, read_config
from streammerge.checkpoint.companions import CompanionIndex, open_fisher
from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.config.schema import MergeConfig
from streammerge.engine.first_use import CannotCompileError, compile_first
from streammerge.engine.in_memory import Take, merge_in_memory
from streammerge.engine.merge import NonFinite
from streammerge.errors import ConfigError, InputError, printable
from streammerge.events import Control, Event
from streammerge.planning.inputs import Sources, open_inputs
from streammerge.planning.options import PlanOptions
from streammerge.planning.plan import MergePlan
from streammerge.planning.prepare import SLOWER, prepare
from streammerge.tensors.state_dicts import HeldReader, StateDict, held_fisher, ties_of
from streammerge.units import nbytes_of

if TYPE_CHECKING:
    import torch

    _Item = tuple[str, torch.Tensor] | Event | BaseException | None

ModelLike = Any
"""A mapping of names to torch tensors or numpy arrays, anything with a ``state_dict()`` that returns one (an
``nn.Module``), or the path or hub name of a model on the disk."""
_ONE_SHARD = 1 << 62
_AHEAD = 2
"""Finished tensors that wait for the caller of `iter_merged`."""


def merge_state_dicts(
    config: ConfigLike,
    models: Mapping[str, ModelLike],
    *,
    fishers: Mapping[str, ModelLike] | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    device: str = "auto",
    seed: int | None = None,
    methods: str | os.PathLike[str] | None = None,
    kernels: bool | None = None,
    nonfinite: NonFinite = "error",
    progress: bool = True,
    on_event: OnEvent | None = None,
    stop: threading.Event | None = None,
) -> dict[str, torch.Tensor]:
    """Merge models in memory: the same formulas, and the same bits, as a merge of the same models saved as safetensors.

    Nothing is written. The inputs are read piece by piece and neither copied nor changed.

    Parameters
    ----------
    config
        As in `merge`. Its models, ``base_model`` and ``fisher`` are keys of `models` and `fishers`.
    models
        The models by name: state dicts (torch tensors on any device, or numpy arrays), modules (anything with a
        ``state_dict()``), or paths of models on the disk.
    fishers
        Fisher diagonals by name, of the same kinds, for methods that use them.
    memory
        Bound of the memory in addition to the inputs and the output, ``"2GiB"`` or bytes; default: half of what is free.
    threads
        CPUs to keep busy; default: those available.
    device
        ``auto``, ``cpu`` or ``cuda[:N]``. The output is on the CPU.
    seed
        Overrides the config's.
    methods
        A Python file with methods of your own.
    kernels
        As for `merge`.
    nonfinite
        ``error``: stop at NaN or infinity, in an input or by overflow; ``warn``: keep and report it.
    progress
        Whether to show a bar (on terminals and in notebooks) or lines on stderr.
    on_event
        Receives every event, warnings included, instead of the bar and Python's warnings.
    stop
        Set it, from a different thread, to stop.

    Returns
    -------
    dict
        The merged tensors, in the order of the base's, or else the first model's. Tensors that share their memory in
        every model (tied embeddings) are one tensor in the output too.

    Raises
    ------
    InputError
        If the config, a model or the memory does not allow the merge.
    Stopped
        If `stop` was set.

    Examples
    --------
    >>> import torch, streammerge
    >>> a, b = {"w": torch.zeros(2, 3)}, {"w": torch.ones(2, 3)}
    >>> config = {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 0.5}}
    >>> streammerge.merge_state_dicts(config, {"a": a, "b": b}, progress=False)["w"]
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    """
    _check_nonfinite(nonfinite)
    held = _Held(models, fishers or {})
    plan = held.plan(
        config, memory=memory, threads=threads, device=device, seed=seed, methods=methods, kernels=kernels
    )
    done: dict[str, torch.Tensor] = {}
    with controlled(on_event, progress, "merging", stop) as control:
        _run(plan, held, done.__setitem__, nonfinite, control)
    order = held.order(plan)
    done |= {name: done[first] for name, first in held.ties(plan).items() if first in done}
    return {
        name: done[name] for name in (*(n for n in order if n in done), *(n for n in done if n not in order))
    }


def iter_merged(
    config: ConfigLike,
    models: Mapping[str, ModelLike],
    *,
    fishers: Mapping[str, ModelLike] | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    device: str = "auto",
    seed: int | None = None,
    methods: str | os.PathLike[str] | None = None,
    kernels: bool | None = None,
    nonfinite: NonFinite = "error",
    progress: bool = False,
    on_event: OnEvent | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge models in memory tensor by tensor, like `merge_state_dicts`, when the output need not fit in memory.

    The merge runs in parallel with the caller and waits for it, so only a few finished tensors are held. Tensors come in the
    order in which they are finished. Leaving the loop stops the merge.

    Parameters
    ----------
    config, models, fishers, memory, threads, device, seed, methods, kernels, nonfinite, progress, on_event
        As for `merge_state_dicts`.

    Yields
    ------
    tuple
        The name and the merged tensor. A tensor that shares its memory with a different one comes after that one.

    Raises
    ------
    InputError
        At the call, if the config, a model or the memory does not allow the merge; during the run, if a value is not
        finite.

    Examples
    --------
    >>> import torch, streammerge
    >>> models = {"a": {"w": torch.zeros(4)}, "b": {"w": torch.ones(4)}}
    >>> config = {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 0.5}}
    >>> for name, tensor in streammerge.iter_merged(config, models):
    ...     print(name, tensor.tolist())
    w [0.5, 0.5, 0.5, 0.5]
    """
    _check_nonfinite(nonfinite)
    held = _Held(models, fishers or {})
    plan = held.plan(
        config, memory=memory, threads=threads, device=device, seed=seed, methods=methods, kernels=kernels
    )
    return _stream(plan, held, nonfinite, progress, on_event)


def _stream(
    plan: MergePlan, held: _Held, nonfinite: NonFinite, progress: bool, on_event: OnEvent | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Run a merge in a separate thread; yield its tensors and report its events in the caller's thread."""
    stop, leaving = threading.Event(), threading.Event()
    finished: queue.Queue[_Item] = queue.Queue(_AHEAD)
    again: dict[str, list[str]] = {}
    for name, first in held.ties(plan).items():
        again.setdefault(first, []).append(name)

    def put(item: _Item) -> None:
        while not leaving.is_set():
            with suppress(queue.Full):
                finished.put(item, timeout=0.1)
                return

    def run() -> None:
        try:
            _run(plan, held, lambda name, tensor: put((name, tensor)), nonfinite, Control(put, stop))
            put(None)
        except BaseException as error:  # raised where the caller waits
            put(error)

    thread = threading.Thread(target=run, name="merging")
    thread.start()
    try:
        with controlled(on_event, progress, "merging") as control:
            while (item := finished.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Event):
                    control.emit(item)
                else:
                    yield item
                    yield from ((name, item[1]) for name in again.get(item[0], ()))
    finally:
        leaving.set()
        stop.set()
        thread.join()


def _run(plan: MergePlan, held: _Held, take: Take, nonfinite: NonFinite, control: Control) -> None:
    try:
        try:
            compile_first(plan, control)
        except CannotCompileError as error:
            control.warn(SLOWER.format(error))
            plan = held.in_torch()
        merge_in_memory(plan, held.reader, take, tolerant=nonfinite == "warn", control=control)
    finally:
        held.reader.close()


def _check_nonfinite(nonfinite: str) -> None:
    if nonfinite not in get_args(NonFinite):
        raise InputError(f"nonfinite {printable(nonfinite)!r} is not one of {', '.join(get_args(NonFinite))}")


class _Held:
    """The models that the caller holds in memory, prepared for a plan."""

    def __init__(self, models: Mapping[str, ModelLike], fishers: Mapping[str, ModelLike]) -> None:
        self._dicts = _state_dicts("models", models)
        self._fishers = _state_dicts("fishers", fishers)
        self._files = {
            name: replace(open_model(path), reference=name) for name, path in models.items() if _is_path(path)
        }
        self._fisher_files = {name: path for name, path in fishers.items() if _is_path(path)}
        self._ties = ties_of(list(self._dicts.values()), list(self._files.values()))
        self._asked: set[str] = set()
        self.in_torch: Callable[[], MergePlan]
        """Function that makes the last plan again, without compiled kernels."""
        self.reader = HeldReader([*self._dicts.values(), *self._fishers.values()])

    def plan(
        self, config: ConfigLike, *, methods: str | os.PathLike[str] | None, **options: Any
    ) -> MergePlan:
        """Return the plan of a config over these models."""
        written = read_config(config, methods)
        if written.stages:
            raise ConfigError(f"{written.where}: stages are not merged in memory: merge one after the other")
        parsed, method = settle(written)
        _refuse_tokenizers(parsed)
        sources = Sources(model=self._model, fisher=self._fisher, reader=self.reader)
        opened = open_inputs(parsed, method, sources)
        idle = sorted({*self._dicts, *self._files} - self._asked)
        if idle:
            raise InputError(
                f"models: {printable(repr(idle[0]), 120)} is given, but the config does not name it"
            )
        options |= {"memory": nbytes_of(options["memory"]), "shard_size": _ONE_SHARD, "tensors_only": True}
        chosen = PlanOptions(**options)
        self.in_torch = lambda: prepare(parsed, method, opened, replace(chosen, kernels=False))
        return prepare(parsed, method, opened, chosen)

    def _model(self, reference: str) -> TensorIndex:
        self._asked.add(reference)
        if reference in self._dicts:
            return self._dicts[reference].index(reference, self._ties)
        if reference in self._files:
            return self._files[reference]
        raise _unknown("model", "models", reference, [*self._dicts, *self._files])

    def _fisher(self, reference: str) -> CompanionIndex:
        if reference in self._fishers:
            return held_fisher(self._fishers[reference])
        if reference in self._fisher_files:
            return open_fisher(self._fisher_files[reference])
        raise _unknown("fisher", "fishers", reference, [*self._fishers, *self._fisher_files])

    def ties(self, plan: MergePlan) -> dict[str, str]:
        """Return the template model's tensors that share memory with a different tensor, each with that tensor."""
        template = self._dicts.get(plan.template.reference)
        merged = {job.name for job in plan.jobs}
        return {
            name: first
            for name, first in self._ties.items()
            if template is not None and name in template.tensors and name not in merged
        }

    def order(self, plan: MergePlan) -> dict[str, None]:
        """Return the names of the template model's tensors in the caller's order."""
        template = self._dicts.get(plan.template.reference)
        return dict.fromkeys(plan.template if template is None else template.tensors)


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _state_dicts(what: str, values: Mapping[str, ModelLike]) -> dict[str, StateDict]:
    """Return those of the values that are tensors in memory."""
    if not isinstance(values, Mapping):
        raise InputError(f"{what}: must be a mapping of names to state dicts, not a {type(values).__name__}")
    found = {}
    for name, value in values.items():
        path = f"{what}[{name!r}]"
        if not isinstance(value, Mapping) and callable(getattr(value, "state_dict", None)):
            value = value.state_dict()
        if isinstance(value, Mapping):
            found[name] = StateDict(path, value)
        elif not _is_path(value):
            raise InputError(
                f"{printable(path, 200)}: must be a state dict, a module or a path, not a {type(value).__name__}"
            )
    return found


def _unknown(key: str, what: str, reference: str, known: list[str]) -> ConfigError:
    close = get_close_matches(reference, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else ", ".join(map(repr, known)) or "none is given"
    return ConfigError(
        f"config: {key} {printable(repr(reference), 200)} is not a key of `{what}` ({printable(hint)})"
    )


def _refuse_tokenizers(config: MergeConfig) -> None:
    for key, value in (("tokenizer_source", config.tokenizer), ("chat_template", config.chat_template)):
        if value is not None:
            raise ConfigError(
                f"{config.where}: {key}: models in memory have no tokenizer files: remove it, or merge files"
            )
