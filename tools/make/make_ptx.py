"""Compile the fused kernels to the PTX that the package ships; no GPU is needed. With --check only compare.

    python tools/make/make_ptx.py [--check] [--fusion KERNEL]

It needs the version of Triton that pyproject.toml pins: another writes other bytes. The PTX is for compute capability 7.5
(Turing) and newer and for drivers since 2020 (PTX 7.0); the driver compiles it for the GPU it finds. Multiplications and
additions are never contracted, and there is no line information.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ.pop("TRITON_INTERPRET", None)

FOLDER = Path(__file__).parents[2] / "streammerge" / "backends" / "fused"
CHIP, PTX_VERSION = 75, 70


def sources() -> str:
    """Return the digest of the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted((FOLDER / "sources").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def table_of(folder: Path) -> dict[str, Any]:
    """Return the table that lies among compiled kernels."""
    table: dict[str, Any] = json.loads((folder / "kernels.json").read_text())
    return table


def build(
    kernel: Any, *, target: Any = None, fusion: bool = False, ptx_version: int | None = PTX_VERSION
) -> Any:
    """Compile one kernel of the catalog; by default for `CHIP`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict.fromkeys(kernel.arguments, "i64") | dict.fromkeys(kernel.constants, "constexpr")
    ordered = {name: signature[name] for name in kernel.function.arg_names}
    source = ASTSource(kernel.function, ordered, constexprs=kernel.constants)
    options = {"enable_fp_fusion": fusion, "num_warps": kernel.warps}
    if ptx_version is not None:
        options |= {"ptx_version": ptx_version}
    return triton.compile(source, target=target or GPUTarget("cuda", CHIP, 32), options=options)


FORBIDDEN = {
    "a contraction": r"\b(?:fma|mad)(?:\.\w+)*\.f(?:16|32|64)\S*|\bfma\.\S*",
    "a flush to zero": r"\b\w+(?:\.\w+)*\.ftz\S*",
    "an approximation": r"\b\w+(?:\.\w+)*\.approx\S*",
    "an operation that may be contracted": r"\b(?:add|sub|mul)\.(?:ftz\.|sat\.)*(?:f32|f64|f32x2)\b",
    "a division or root that is not IEEE's of fp64": r"\b(?:div|sqrt|rcp|rsqrt)\.(?!rn\.f64\b)(?:\w+\.)*f\d\S*",
    "a call": r"\bcall(?:\.\w+)*",
}
"""What the PTX must not hold, as patterns of its text: each would round otherwise than the CPU, or might."""


def findings(text: str) -> dict[str, list[str]]:
    """Return the instructions that a law of the code forbids, by the law."""
    found = {law: sorted(set(re.findall(pattern, text))) for law, pattern in FORBIDDEN.items()}
    return {law: instructions for law, instructions in found.items() if instructions}


def entry_of(name: str, kernel: Any, compiled: Any) -> dict[str, Any]:
    """Return what the table says of a kernel."""
    text = compiled.asm["ptx"]
    (symbol,) = re.findall(r"\.visible \.entry (\w+)\(", text)
    (threads,) = re.findall(r"\.reqntid (\d+)", text)
    parameters = len(re.findall(rf"\.param \.u?b?\d+ .*{symbol}_param_\d+", text))
    return {
        "file": f"{name}.ptx",
        "entry": symbol,
        "signature": ["i64"] * len(kernel.arguments),
        "nulls": parameters - len(kernel.arguments),
        "threads": int(threads),
        "shared": compiled.metadata.shared,
        "elements": kernel.elements,
    }


def compiled_files(only: list[str] | None = None) -> dict[str, str]:
    """Return the contents of all files of the folder `ptx`, by name."""
    import triton

    from streammerge.backends.fused.sources.catalog import KERNELS

    found, entries = {}, {}
    for name, kernel in KERNELS.items():
        if only is None or name in only:
            compiled = build(kernel)
            entries[name] = entry_of(name, kernel, compiled)
            found[f"{name}.ptx"] = compiled.asm["ptx"]
    digest = hashlib.sha256("".join(found[name] for name in sorted(found)).encode()).hexdigest()
    table = {"triton": triton.__version__, "sources": sources(), "ptx": digest, "kernels": entries}
    return found | {"kernels.json": json.dumps(table, indent=1) + "\n"}


def main() -> int:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    parser.add_argument(
        "--fusion", metavar="KERNEL", help="say what the search finds in one with contraction"
    )
    options = parser.parse_args()
    check = options.check
    began = time.process_time()
    files, folder = compiled_files(), FOLDER / "ptx"
    known = {path.name: path.read_text() for path in folder.iterdir()} if folder.is_dir() else {}
    broken = {
        name: found for name, text in files.items() if (found := findings(text)) and name.endswith(".ptx")
    }
    for name, found in broken.items():
        print(f"{name}: {found}")
    changed = sorted(name for name in files.keys() | known.keys() if files.get(name) != known.get(name))
    if not check:
        folder.mkdir(exist_ok=True)
        for name in changed:
            if name in files:
                (folder / name).write_text(files[name])
            else:
                (folder / name).unlink()
    size = sum(map(len, files.values()))
    print(
        f"{len(files) - 1} kernels, {size:,} bytes, {time.process_time() - began:.1f} CPU s; changed: {changed or 'none'}"
    )
    if options.fusion:
        from streammerge.backends.fused.sources.catalog import KERNELS

        found = findings(build(KERNELS[options.fusion], fusion=True).asm["ptx"])
        print(f"with fusion, {options.fusion}: {found}")
    return bool(broken or (check and changed))


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[2]))
    sys.exit(main())
