"""Read the files of LoRA adapters in PEFT's format.

These are ``adapter_config.json`` and the header of ``adapter_model.safetensors`` (or ``adapter_model.bin``). A tensor
of the adapter is a factor of a weight's change, a magnitude of DoRA, rows of single trained tokens, or a whole tensor
that replaces the base's (``modules_to_save``, biases).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from streammerge.checkpoint.adapters.settings import ADAPTER_CONFIG, AdapterSettings, read_settings
from streammerge.dtypes import FLOATS
from streammerge.errors import ModelError
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import TensorRef
from streammerge.formats.safetensors import read_header
from streammerge.formats.torch_file import read_pickle
from streammerge.io import volumes
from streammerge.io.files import bad, quoted
from streammerge.io.stamp import FileStamp
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

__all__ = ["ADAPTER_CONFIG", "Adapter", "Parts", "read_adapter", "split_reference"]

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_WRAPPED = ".base_layer"
_AT_WORK = ".modules_to_save."
_PARTS = late_pattern(
    r"(?P<module>.+?)(?P<wrapped>(?:\.base_layer)*)"
    r"\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?",
    re.DOTALL,
)
_TOKENS = late_pattern(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?", re.DOTALL)
_COPIES = (".original_module.", ".trainable_tokens_original")
"""Parts of the names of the base's original tensors, which an adapter may contain in addition to trained ones."""

Parts = Mapping[str, TensorRef]
"""The tensors of one change, by part: ``lora_A``, ``lora_B``, ``lora_B.bias``, ``lora_magnitude_vector`` …"""


@dataclass(frozen=True)
class Adapter:
    """The changes of an adapter, by PEFT's name of the module or the tensor."""

    directory: Path
    modules: Mapping[str, tuple[Parts, ...]]
    """The changes of each module: one, or one per entry of `target_parameters`, innermost first."""
    tokens: Mapping[str, TensorRef]
    """The rows of single trained tokens, by module."""
    replaced: Mapping[str, TensorRef]
    """Whole tensors that replace the base's."""
    settings: AdapterSettings
    stamps: tuple[FileStamp, ...]

    @property
    def tensors(self) -> dict[str, TensorRef]:
        """All tensors, by descriptive names."""
        factors = {
            f"{module}{_WRAPPED * level}.{part}": ref
            for module, levels in self.modules.items()
            for level, parts in enumerate(reversed(levels))
            for part, ref in parts.items()
        }
        tokens = {f"{module}.trainable_tokens_delta": ref for module, ref in self.tokens.items()}
        return {**factors, **tokens, **self.replaced}


def read_adapter(directory: Path) -> Adapter:
    """Read the configuration of an adapter and the header of its weights.

    Raises
    ------
    ModelError
        If a file is missing or malformed, or the adapter is not a low-rank sum.
    WorldError
        If the machine cannot read it.
    """
    settings, config_stamp = read_settings(directory / ADAPTER_CONFIG)
    names = [name for name in _WEIGHTS if volumes.lexists(directory / name)]
    if not names:
        raise bad(str(directory), f"an adapter without {_WEIGHTS[0]}: download or copy it again")
    path = directory / names[0]
    if names[0].endswith(".bin"):
        found, stamp = read_pickle(path)
        refs = {name: contiguous(ref) for name, ref in found.items()}
    else:
        refs, _, stamp = read_header(path)
    sorted_out = _Sorted(_adapters(refs))
    for name, ref in refs.items():
        sorted_out.add(name, ref)
    if settings.entries.get("trainable_token_indices") and not sorted_out.tokens:
        raise bad(
            str(path),
            "has no rows of the trainable_token_indices that its configuration lists: the file is not complete",
        )
    return Adapter(
        directory,
        sorted_out.levels(),
        sorted_out.tokens,
        sorted_out.replaced,
        settings,
        (stamp, config_stamp),
    )


class _Sorted:
    """Sorts an adapter's tensors by kind."""

    def __init__(self, adapters: Collection[str]) -> None:
        self._adapters = adapters
        self.factors: dict[str, dict[int, dict[str, TensorRef]]] = {}
        self.tokens: dict[str, TensorRef] = {}
        self._saved: dict[str, TensorRef] = {}
        self._at_work: dict[str, TensorRef] = {}
        """Whole tensors under their names in memory, which PEFT saves additionally after a resize."""

    @property
    def replaced(self) -> dict[str, TensorRef]:
        """Whole tensors; those saved under the module's own name take precedence."""
        return {**self._at_work, **self._saved}

    def add(self, name: str, ref: TensorRef) -> None:
        if ref.dtype not in FLOATS:
            raise bad(ref.path, f"tensor {quoted(name)} is {ref.dtype}: an adapter is made of floats")
        if any(part in name for part in _COPIES):
            return
        place: dict[str, TensorRef]
        plain = _plain(name, self._adapters)
        if match := _TOKENS.fullmatch(plain):
            place, key = self.tokens, match["module"].replace(f"{_WRAPPED}.", ".")
        elif match := _PARTS.fullmatch(plain):
            module = match["module"].replace(f"{_WRAPPED}.", ".")
            level = match["wrapped"].count(_WRAPPED)
            place = self.factors.setdefault(module, {}).setdefault(level, {})
            key = match["part"] if match["leaf"] != "bias" else f"{match['part']}.bias"
        else:
            if ".lora_" in plain or "token_adapter." in plain:
                raise bad(ref.path, f"tensor {quoted(name)}: a kind of adapter that is not supported")
            place = self._at_work if _AT_WORK in name else self._saved
            key = plain.replace(f"{_WRAPPED}.", ".")
        if key in place:
            raise bad(ref.path, f"tensor {quoted(name)} is there under another name too")
        place[key] = ref

    def levels(self) -> dict[str, tuple[Parts, ...]]:
        """Return the changes of each module, innermost first."""
        found: dict[str, tuple[Parts, ...]] = {}
        for module, levels in self.factors.items():
            if (len(levels) == 1 and 0 not in levels) or max(levels) + 1 > len(levels) > 1:
                some = next(iter(next(iter(levels.values())).values()))
                raise bad(
                    some.path, f"module {quoted(module)}: the outer ones of its nested factors are missing"
                )
            found[module] = tuple(levels[level] for level in sorted(levels, reverse=True))
        return found


def _adapters(names: Iterable[str]) -> set[str]:
    """Return the adapter's name within names saved as in memory: ``default`` in ``lora_A.default.weight``."""
    matches = (_PARTS.fullmatch(name) for name in names)
    return {"default", *(match["adapter"] for match in matches if match is not None and match["adapter"])}


def _plain(name: str, adapters: Collection[str] = ("default",)) -> str:
    """Return a tensor's name among the base's modules, without PEFT's wrappers."""
    while name.startswith(_PREFIX):
        name = name.removeprefix(_PREFIX)
    module, saved, inner = name.partition(_AT_WORK)
    if saved and inner.partition(".")[0] in adapters:
        name = f"{module}{_AT_WORK}{inner.partition('.')[2]}"
    return name.replace(f".token_adapter{_WRAPPED}.", ".").replace(_AT_WORK, ".")


def split_reference(reference: str, exists: Callable[[str], bool]) -> tuple[str, str]:
    """Return the model and the adapter of ``model+adapter``; if the split is ambiguous, choose existing paths.

    Raises
    ------
    ModelError
        If several splits remain.
    """
    cuts = [i for i, character in enumerate(reference) if character == "+"]
    ways = [(reference[:i], reference[i + 1 :]) for i in cuts if reference[:i] and reference[i + 1 :]]
    if len(ways) > 1:
        ways = [(model, adapter) for model, adapter in ways if exists(model) and exists(adapter)] or ways
    if len(ways) != 1:
        raise ModelError(f"{quoted(reference)}: not one model and one adapter (model+adapter)")
    return ways[0]
