"""A transformers model without weights: parameters are on the meta device, small buffers are real.

Its layers are the largest list of modules; no list of architectures is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import InputError, ModelError, printable
from streammerge.io.volumes import refuse_url

CAUSAL, CLASSIFIER = "causal language model", "sequence classifier"
_ENDS = {"ForCausalLM": CAUSAL, "LMHeadModel": CAUSAL, "ForSequenceClassification": CLASSIFIER}
CURE = "install it with `pip install 'streammerge[hf]'`"


class Skeleton:
    """A model with the right shapes and no weights.

    Attributes
    ----------
    model
        The model in evaluation mode; every parameter is on the meta device.
    kind
        `CAUSAL` or `CLASSIFIER`.
    blocks
        The layers in the order of execution.
    aliases
        All names of each parameter; tied parameters have several.
    outer
        The parameters outside the layers.
    embeddings
        The outer parameters that are embeddings.
    """

    def __init__(self, index: TensorIndex) -> None:
        self.reference = index.reference
        self.kind, architecture = _kind_of(index)
        self.model = _build(index, self.kind, architecture)
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ModelError(
                f"{printable(self.reference)}: {architecture} has an encoder and a decoder; only models with a single stack of layers are supported"
            )
        self.blocks_name, self.blocks = _largest_list(self.model, self.reference)
        self.aliases: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            self.aliases.setdefault(parameter, []).append(name)
        inner = {p for block in self.blocks for p in block.parameters()}
        self.outer = [p for p in self.aliases if p not in inner]
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        self.embeddings = [p for p in self.outer if id(p) in tables]

    @property
    def n_labels(self) -> int:
        """Number of labels, for a classifier."""
        return int(self.model.config.num_labels)

    @property
    def label_numbers(self) -> Mapping[str, int]:
        """A classifier's labels, by name."""
        names = {int(i): str(name) for i, name in self.model.config.id2label.items()}
        return {names.get(i, str(i)): i for i in range(self.n_labels)}

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def positions(self) -> int | None:
        """Most tokens that its position embeddings allow; None if its config has no limit."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        # RoBERTa and similar models count positions from the padding id plus 1.
        return (
            None if not longest else int(longest) - (padding + 1 if _counts_from_padding(self.model) else 0)
        )

    def name(self, parameter: nn.Parameter) -> str:
        """Return the first name of a parameter."""
        return self.aliases[parameter][0]


def _kind_of(index: TensorIndex) -> tuple[str, str]:
    names = index.config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    for end, kind in _ENDS.items():
        if architecture.endswith(end):
            return kind, architecture
    said = printable(architecture, 80) or "not said"
    raise ModelError(
        f"{printable(index.reference)}: config.json: unsupported architecture {said}: use a causal language model "
        "(…ForCausalLM) or a sequence classifier (…ForSequenceClassification)"
    )


@contextmanager
def _without_triton() -> Iterator[None]:
    """Have transformers import a model without Triton, which serves GPUs alone: torch's compiler would import it, and hold 80 MiB."""
    hides = not torch.cuda.is_available() and "triton" not in sys.modules
    if hides:
        sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hides:
            del sys.modules["triton"]


def _build(index: TensorIndex, kind: str, architecture: str) -> Any:
    refuse_url(index.directory, index.reference, "transformers")
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"transformers is needed to run a model ({error}); {CURE}") from None
    transformers.utils.logging.set_verbosity_error()
    auto = (
        transformers.AutoModelForCausalLM
        if kind == CAUSAL
        else transformers.AutoModelForSequenceClassification
    )
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(index.directory), local_files_only=True, trust_remote_code=False
        )
        config.use_cache = False
        with _without_triton(), _parameters_on_meta():
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # a foreign config may raise anything in the library
        raise ModelError(
            f"{printable(index.reference)}: transformers cannot build {printable(architecture, 80)} from config.json: "
            f"{printable(str(error).strip() or type(error).__name__, 300)}"
        ) from error
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device when a module registers it; buffers stay real.

    The memory from `torch.empty` is untouched at that point, so it never becomes resident.
    """
    register = nn.Module.register_parameter

    def register_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _largest_list(model: nn.Module, reference: str) -> tuple[str, nn.ModuleList]:
    """Return the list of modules with the most parameters: the layers."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(
            f"{printable(reference)}: {type(model).__name__} has no list of layers, so it cannot be run layer by layer"
        )
    return max(lists, key=lambda entry: (sum(p.numel() for p in entry[1].parameters()), -len(entry[0])))


def _counts_from_padding(model: nn.Module) -> bool:
    return any(
        name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx
        for name, module in model.named_modules()
    )
