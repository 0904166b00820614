"""Compute the gates of a mixture of experts from prompts, with one layer of the base model in memory at a time.

``hidden``, ``hidden_last``: the input of each layer at the prompt's last token. ``hidden_avg``: its mean over the tokens.
``cheap_embed``: the sum of the tokens' embeddings, the same for each layer. An expert's gate is the mean over its positive
prompts minus that over its negative prompts, of length 1.

Every prompt runs alone, in one thread, so that neither its neighbours nor the number of threads change a bit. torch's
products differ in the last bits between its versions and between CPUs.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.config.moe import MoeSpec
from streammerge.dtypes import itemsize
from streammerge.errors import BudgetError, ModelError, printable
from streammerge.estimate.gates.prompts import Prompts, tokenized
from streammerge.estimate.network.examples import digest
from streammerge.estimate.network.loader import Loader
from streammerge.estimate.network.resident import Resident
from streammerge.estimate.network.run import Call, Network
from streammerge.estimate.network.sizing import RESERVE, StageSize, layer_activations
from streammerge.estimate.network.skeleton import Skeleton
from streammerge.events import Control, Event
from streammerge.io.reader import Reader
from streammerge.numerics.casts import F64, widened
from streammerge.planning.plan import MergePlan
from streammerge.tensors.read import read_elements
from streammerge.units import format_at_least, format_size

_ALIKE = 1 - 1e-6
"""Cosine from which two gates count as equal."""
_CPU = torch.device("cpu")


def prepare_gates(plan: MergePlan) -> None:
    """Check that the gates of a plan can be computed, and record what they depend on; nothing is run.

    Raises
    ------
    InputError
        If transformers, the tokenizer or the memory does not allow it, or a prompt is bad.
    """
    if plan.gates is not None:
        plan.gates.identity = _Source(plan).identity


def compute_gates(plan: MergePlan, control: Control) -> None:
    """Compute the gates of a plan, unless they are known.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`; `Stopped` if a stop is requested.
    """
    if plan.gates is None or plan.gates.values is not None:
        return
    source = _Source(plan)
    reader = Reader()
    try:
        values = (source.hidden if source.spec.runs_base else source.embedded)(reader, control)
    finally:
        reader.close()
    if not np.isfinite(values).all():
        raise ModelError(
            f"{printable(source.base.reference)}: a hidden state of a prompt is NaN or infinite, so there is no gate"
        )
    for line in _alike(values, source.spec):
        control.warn(line)
    plan.gates.values = values
    _return_memory()


class _Source:
    """The base model and the prompts of a plan."""

    def __init__(self, plan: MergePlan) -> None:
        assert plan.base is not None
        assert plan.config.moe is not None
        assert plan.gates is not None
        self.base, self.spec = plan.base, plan.config.moe
        self.threads = plan.budget.threads
        self.embedding = self.base["model.embed_tokens.weight"]
        self.skeleton = Skeleton(self.base) if self.spec.runs_base else None
        longest = None if self.skeleton is None else self.skeleton.positions
        self.prompts: Prompts = tokenized(self.base, plan.gates.experts, self.embedding.shape[0], longest)
        self.layers = plan.gates.layers
        if self.skeleton is not None:
            self._check(self.skeleton, plan.budget.total)

    @property
    def identity(self) -> dict[str, str]:
        """What the gates depend on, in addition to the config and the base model."""
        found = {"tokens of the prompts": digest(self.prompts.examples)}
        if self.skeleton is not None:
            import transformers

            found |= {
                "version of torch": torch.__version__,
                "version of transformers": transformers.__version__,
            }
        return found

    def _check(self, skeleton: Skeleton, memory: int) -> None:
        """Refuse a model with a different number of layers than the plan, and one that does not fit in memory."""
        if len(skeleton.blocks) != self.layers:
            raise ModelError(
                f"{printable(self.base.reference)}: config.json has {len(skeleton.blocks)} layers, the checkpoint {self.layers}"
            )
        examples, width = self.prompts.examples, self.embedding.shape[1]
        heads = getattr(skeleton.model.config, "num_attention_heads", 1)
        at_once = sum(example.length for example in examples[-self.threads :])
        stages = []
        for i, block in enumerate(skeleton.blocks):
            shapes = [p.shape for p in block.parameters()]
            running = layer_activations(shapes, examples[-1].length, width, heads, 1)
            # Weights are fp32 and have no sums here.
            whole = sum(p.numel() for p in block.parameters()) // 2
            share = -(-at_once // examples[-1].length)
            stages.append(StageSize(f"layer {i}", 0, whole=whole, activations=running * share))
        largest = max(stages, key=lambda stage: stage.nbytes)
        states = 4 * width * sum(example.length for example in examples)
        rows = self.layers * len(self.prompts.positive) + 4 * (len(examples) + len(self.prompts.positive))
        states += 4 * width * rows  # the gates, and their vectors in fp64
        needed = RESERVE + largest.nbytes + states
        if needed > memory:
            raise BudgetError(
                f"gate_mode '{self.spec.gate_mode}' needs {format_size(needed)}: {format_size(RESERVE)} for the process, "
                f"{format_size(largest.nbytes)} for {largest.name} of the base model, {format_size(states)} for the hidden states of all "
                f"prompts and the gates; --memory is {format_size(memory)}: give at least {format_at_least(needed)}, or use gate_mode 'cheap_embed' "
                "or 'random'",
                needed,
            )

    def embedded(self, reader: Reader, control: Control) -> NDArray[np.float32]:
        """Return the gates of the mode ``cheap_embed``, [layers, experts, hidden]."""
        ref, width = self.embedding, self.embedding.shape[1]
        features = np.zeros((len(self.prompts.examples), width))
        for total, example in zip(features, self.prompts.examples, strict=True):
            control.check()
            for i in example.ids.tolist():
                row = read_elements(reader, ref, i * width, (i + 1) * width)
                total += widened(row[: width * itemsize(ref.dtype)], ref.dtype, F64)
        gates = self.prompts.gates_of(features).astype(np.float32)
        return np.broadcast_to(gates, (self.layers, *gates.shape))

    @torch.no_grad()
    def hidden(self, reader: Reader, control: Control) -> NDArray[np.float32]:
        """Return the gates of the modes of hidden states, [layers, experts, hidden]."""
        assert self.skeleton is not None
        network = Network(self.skeleton, _CPU)
        loader = Loader(self.skeleton, self.base, reader)
        gates = np.empty((self.layers, len(self.prompts.positive), self.embedding.shape[1]), np.float32)
        with _one_thread(), ThreadPoolExecutor(self.threads, thread_name_prefix="gates") as threads:
            states = self._embed(network, loader, control)
            for i in range(self.layers):
                control.emit(
                    Event("gates", {"layer": i, "layers": self.layers, "bytes_read": reader.bytes_read})
                )
                gates[i] = self.prompts.gates_of(np.stack([self._feature(state) for state in states]))
                if i + 1 < self.layers:  # the last layer's output is no layer's input
                    self._layer(network, loader, i, states, threads, control)
        return gates

    def _embed(self, network: Network, loader: Loader, control: Control) -> list[Tensor]:
        """Return the input of the first layer for each prompt, [1, tokens, hidden]."""
        weights = Resident(loader, _CPU, network.skeleton.outer, "the part before the layers")
        states = []
        for example in self.prompts.examples:
            control.check()
            states.append(network.embed(example, weights))
        return states

    def _feature(self, state: Tensor) -> NDArray[np.float64]:
        """Return the vector of a prompt, [hidden]."""
        rows = state[0].double()
        chosen = rows.mean(dim=0) if self.spec.gate_mode == "hidden_avg" else rows[-1]
        values: NDArray[np.float64] = chosen.numpy()
        return values

    def _layer(
        self,
        network: Network,
        loader: Loader,
        i: int,
        states: list[Tensor],
        threads: ThreadPoolExecutor,
        control: Control,
    ) -> None:
        """Replace the states by the output of a layer."""
        weights = Resident(loader, _CPU, list(network.skeleton.blocks[i].parameters()), f"layer {i}")
        examples = self.prompts.examples

        def run(n: int, call: Call) -> None:
            if not control.stop.is_set():
                with torch.no_grad():
                    states[n] = network.block(i, states[n], call, weights)

        run(0, network.call(i, examples[0]))  # reads the weights
        futures = [threads.submit(run, n, network.call(i, examples[n])) for n in range(1, len(examples))]
        for future in futures:
            future.result()
        control.check()


def _alike(values: NDArray[np.float32], spec: MoeSpec) -> Iterator[str]:
    """Yield warnings on experts that cannot be told apart, and on gates of zeros."""
    n = len(spec.experts)
    for layer, all_gates in enumerate(values):
        gates = all_gates[:n].astype(np.float64)
        empty = [i for i, gate in enumerate(gates) if not gate.any()]
        if empty:
            yield f"layer {layer}: the gate of expert {empty[0]} is zero: its prompts cancel out"
            return
        cosines = np.triu(gates @ gates.T, 1)
        if n > 1 and cosines.max() > _ALIKE:
            a, b = (int(i) for i in np.unravel_index(cosines.argmax(), cosines.shape))
            yield f"layer {layer}: the gates of experts {a} and {b} are the same: give them prompts that differ more"
            return


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let each torch function run in the thread that calls it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _return_memory() -> None:
    """Return freed memory to the system, since the merge counts on it."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):  # a C library without it
            return
