"""The key `output: lora`: a low-rank adapter of the result minus its base, in place of the merged model."""

from __future__ import annotations

from typing import Any

from streammerge.config.references import parse_base, parse_text
from streammerge.config.values import parse_exclude
from streammerge.config.wording import check_keys, child, refuse, shown
from streammerge.records import dataclass

DEFAULT_RANK = 32
DEFAULT_MAX_RANK = 256
MOST_RANK = 1 << 14
KEYS = (
    "kind",
    "base",
    "max_rank",
    "include",
    "exclude",
    "embeddings",
    "modules_to_save",
    "drop_rest",
)
"""Keys of the map that stands for `lora`; `rank` and `energy` are keys of the config itself."""


@dataclass(frozen=True)
class LoraOutput:
    """What the adapter holds, and of what rank."""

    rank: int | None = DEFAULT_RANK
    """The rank of every module; None: a rank by module, from `energy`."""
    energy: float | None = None
    """The share of the squared norm of a module's change that its rank must suffice for."""
    max_rank: int = DEFAULT_MAX_RANK
    """The most that `energy` may choose."""
    base: str | None = None
    """The model that the adapter belongs to; None: the config's base."""
    include: str | None = None
    """Regular expression: only modules whose names it finds are in the adapter."""
    exclude: str | None = None
    """Regular expression of modules that the adapter leaves out."""
    embeddings: bool = False
    """Whether embeddings and heads are decomposed too; otherwise they are stored whole."""
    modules_to_save: tuple[str, ...] = ()
    """Names, or ends of names, of modules that are stored whole."""
    drop_rest: bool = False
    """Whether everything that is not decomposed is left out."""
    path: str = ""
    """Its place in the config, for messages."""

    @property
    def most(self) -> int:
        """The largest rank that a module may have."""
        return self.max_rank if self.rank is None else self.rank


def extraction(
    model: str, base: str, *, rank: int | None, energy: float | None, dtype: str | None, **output: Any
) -> dict[str, Any]:
    """Return the config that extracts an adapter of one model; `output` has further keys of the map `output`."""
    given = {key: value for key, value in output.items() if value}
    top = {"rank": rank, "energy": energy, "dtype": dtype}
    return {
        "merge_method": "passthrough",
        "models": [{"model": model}],
        "output": {"kind": "lora", "base": base, **given},
        **{key: value for key, value in top.items() if value is not None},
    }


def parse_lora(data: dict[str, Any], top: str) -> LoraOutput | None:
    """Return what the keys `output`, `rank` and `energy` of a config describe; None without an `output`.

    Raises
    ------
    ConfigError
        If a value is not valid, or `rank` and `energy` are both set.
    """
    place = child(top, "output")
    value = data.get("output")
    if value is None:
        for key in ("rank", "energy"):
            if data.get(key) is not None:
                refuse(child(top, key), "goes with `output: lora`")
        return None
    if data.get("sweep") is not None:
        refuse(place, "goes with one merge, not with a sweep: sweep first, then make an adapter of the best")
    given = {"kind": value} if isinstance(value, str) else value
    if not isinstance(given, dict):
        refuse(place, f"must be lora, or a map (kind: lora, …), not {shown(value)}")
    check_keys(given, place, KEYS)
    if given.get("kind") != "lora":
        refuse(place, f"{shown(given.get('kind'))} is not lora: leave the key out to write the merged model")
    if data.get("rank") is not None and data.get("energy") is not None:
        refuse(top, "'rank' and 'energy' cannot both be set")
    energy = _energy(data.get("energy"), child(top, "energy"))
    rank = None if energy is not None else _rank(data.get("rank", DEFAULT_RANK), child(top, "rank"))
    if rank is not None and given.get("max_rank") is not None:
        refuse(child(place, "max_rank"), "goes with `energy`; `rank` is the rank itself")
    base = given.get("base")
    return LoraOutput(
        rank,
        energy,
        _rank(given.get("max_rank", DEFAULT_MAX_RANK), child(place, "max_rank")),
        None if base is None else parse_base(base, child(place, "base"))[0],
        _pattern(given, "include", place),
        _pattern(given, "exclude", place),
        _flag(given, "embeddings", place),
        _names(given.get("modules_to_save", []), child(place, "modules_to_save")),
        _flag(given, "drop_rest", place),
        place,
    )


def _rank(value: object, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_RANK:
        refuse(path, f"must be an integer from 1 to {MOST_RANK}, not {shown(value)}")
    return value


def _energy(value: object, path: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        refuse(path, f"must be a share of the squared norm, above 0 and at most 1, not {shown(value)}")
    return float(value)


def _pattern(given: dict[str, Any], key: str, path: str) -> str | None:
    if given.get(key) is None:
        return None
    where = child(path, key)
    return parse_exclude([parse_text(given[key], where)], where)[0]


def _flag(given: dict[str, Any], key: str, path: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        refuse(child(path, key), f"must be true or false, not {shown(value)}")
    return value


def _names(value: object, path: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        refuse(path, f"must be a list of modules' names, not {shown(value)}")
    return tuple(parse_text(item, f"{path}[{i}]") for i, item in enumerate(items))
