"""Read LoRA files of image models: one file without a configuration, as diffusers and kohya's scripts write it.

A module has two factors, and usually ``alpha``: the change is ``alpha / rank * B A``, and ``B A`` without an alpha. What
diffusers records of PEFT's configurations in the file's metadata takes precedence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from streammerge.checkpoint.adapters.files import Adapter
from streammerge.checkpoint.adapters.image_names import place_of_lora, places_of_modules
from streammerge.checkpoint.adapters.settings import AdapterSettings, check_kind
from streammerge.dtypes import FLOATS
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import TensorRef
from streammerge.formats.safetensors import read_header
from streammerge.formats.torch_file import read_pickle
from streammerge.io import volumes
from streammerge.io.files import bad, quoted, read_exactly, reading
from streammerge.io.stamp import FileStamp
from streammerge.io.strict_json import parse_object
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

WEIGHTS = "pytorch_lora_weights.safetensors"
FUSE = "fuse it in diffusers (`load_lora_weights`, `fuse_lora`, `save_pretrained`) and merge the pipeline that results"
"""The cure for adapters that cannot be applied here."""
_METADATA = "lora_adapter_metadata"
_ENDS = (
    (".lora_A.weight", "lora_A"),
    (".lora_B.weight", "lora_B"),
    (".lora_B.bias", "lora_B.bias"),
    (".lora_magnitude_vector", "lora_magnitude_vector"),
    (".lora_magnitude_vector.weight", "lora_magnitude_vector"),
    (".lora_down.weight", "lora_A"),
    (".lora_up.weight", "lora_B"),
    (".lora.down.weight", "lora_A"),
    (".lora.up.weight", "lora_B"),
    ("_lora.down.weight", "lora_A"),
    ("_lora.up.weight", "lora_B"),
    (".alpha", "alpha"),
)
"""How the names of a module's tensors end, and what they are."""
_TO_OUT = late_pattern(r"\.to_out$")
"""The projection of an attention processor of old files, whose module is the first of two."""


@dataclass(frozen=True)
class ImageSettings(AdapterSettings):
    """The scales of the modules of a LoRA file."""

    scales: Mapping[str, float]
    """The scale of each module that has one; others have 1."""

    def scale(self, module: str, rank: int) -> float:
        """Return the scale of the product of a module's factors."""
        return self.scales.get(module, 1.0)


def is_image_adapter(path: Path) -> bool:
    """Return whether a path is a LoRA for an image model: a single file (kohya), or a folder as diffusers writes it."""
    return volumes.isfile(path) or volumes.lexists(path / WEIGHTS)


def read_image_adapter(path: Path, base: Iterable[str], reference: str) -> Adapter:
    """Read the header of a LoRA file; its modules get the names that they have in the base.

    Parameters
    ----------
    path
        The file, or the folder that holds it.
    base
        The names of the base's tensors.
    reference
        The base's reference, for messages.

    Raises
    ------
    ModelError
        If the file is malformed, is no plain LoRA, or has a module that the base lacks.
    WorldError
        If the machine cannot read it.
    """
    file = path if volumes.isfile(path) else path / WEIGHTS
    refs, metadata, stamp = _open(file)
    factors = _by_module(refs)
    if not metadata:
        _check_scales(factors, str(file))
    places = places_of_modules(name.removesuffix(".weight") for name in base if name.endswith(".weight"))
    modules: dict[str, tuple[dict[str, TensorRef], ...]] = {}
    scales: dict[str, float] = {}
    for named, parts in factors.items():
        some = next(iter(parts.values()))
        place = place_of_lora(named)
        found = [] if place is None else places.get(place, [])
        if not found:
            raise bad(some.path, f"adapts {quoted(named)}, which is no module of {reference}: {FUSE}")
        if len(found) > 1:
            raise bad(
                some.path,
                f"adapts {quoted(named)}, which may be any of several modules of {reference}: {FUSE}",
            )
        module, alpha = found[0], parts.pop("alpha", None)
        if module in modules:
            raise bad(some.path, f"adapts module {quoted(module)} under two names")
        if not parts:
            raise bad(some.path, f"tensor {quoted(some.name)} is an alpha without factors")
        rank = parts["lora_A"].shape[0] if "lora_A" in parts and parts["lora_A"].shape else 0
        scales[module] = _scale(named, rank, alpha, metadata, str(file))
        modules[module] = (parts,)
    settings = ImageSettings(str(file), {"scales": scales}, scales)
    return Adapter(path, modules, {}, {}, settings, (stamp,))


def _open(file: Path) -> tuple[Mapping[str, TensorRef], Mapping[str, Any], FileStamp]:
    """Return a file's tensors, diffusers' record of the configurations, and the stamp."""
    if file.name.endswith(".safetensors"):
        refs, metadata, stamp = read_header(file)
        text = metadata.get(_METADATA)
        record = {} if text is None else parse_object(text.encode(), str(file), _METADATA, "any")
        return refs, record, stamp
    found, stamp = read_pickle(file)
    return {name: contiguous(ref) for name, ref in found.items()}, {}, stamp


def _by_module(refs: Mapping[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """Return the tensors of each module by part, under the file's own names of modules."""
    found: dict[str, dict[str, TensorRef]] = {}
    for name, ref in refs.items():
        end, part = next(((end, part) for end, part in _ENDS if name.endswith(end)), ("", ""))
        if not part:
            raise bad(ref.path, f"tensor {quoted(name)} is no factor of a plain LoRA: {FUSE}")
        if ref.dtype not in FLOATS:
            raise bad(ref.path, f"tensor {quoted(name)} is {ref.dtype}: an adapter is made of floats")
        module = name.removesuffix(end)
        if ".processor." in module:
            module = _TO_OUT.sub(".to_out.0", module.replace(".processor.", "."))
        parts = found.setdefault(module, {})
        if part in parts:
            raise bad(ref.path, f"tensor {quoted(name)} is there under another name too")
        parts[part] = ref
    return found


def _check_scales(factors: Mapping[str, Mapping[str, TensorRef]], path: str) -> None:
    """Refuse a file whose scales loaders guess differently: without alphas for ranks that differ, or for some modules."""
    alphas = ["alpha" in parts for parts in factors.values()]
    ranks = {parts["lora_A"].shape[:1] for parts in factors.values() if "lora_A" in parts}
    unknown = "so that its scales are unknown"
    if any(alphas) != all(alphas):
        raise bad(path, f"has an alpha for {sum(alphas)} of {len(alphas)} modules, {unknown}: {FUSE}")
    if not any(alphas) and len(ranks) > 1:
        raise bad(path, f"has modules of different ranks and no alpha, {unknown}: {FUSE}")


def _scale(named: str, rank: int, alpha: TensorRef | None, metadata: Mapping[str, Any], path: str) -> float:
    """Return the scale of a module: of the recorded configuration, else alpha / rank, else 1."""
    prefix, _, module = named.partition(".")
    entries = {
        key.removeprefix(f"{prefix}."): value
        for key, value in metadata.items()
        if key.startswith(f"{prefix}.")
    }
    if module and entries and rank:
        check_kind(entries, path)
        return AdapterSettings(path, entries).scale(module, rank)
    if alpha is None:
        return 1.0
    if alpha.n_elements != 1:
        raise bad(path, f"tensor {quoted(alpha.name)} is {list(alpha.shape)}, where one number is expected")
    import numpy as np  # late: headers are read without it

    from streammerge.numerics.casts import F64, widened

    with reading(alpha.path) as (fd, _):
        raw = read_exactly(fd, alpha.nbytes, alpha.offset, alpha.path)
    value = float(widened(np.frombuffer(raw, np.uint8), alpha.dtype, F64)[0])
    if not abs(value) < np.inf:
        raise bad(path, f"tensor {quoted(alpha.name)} is {value:g}, which is no scale")
    return value / max(1, rank)
