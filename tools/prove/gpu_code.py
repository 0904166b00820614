"""The law of the machine code: what the assemblers make of the fused kernels, for chips of NVIDIA and of AMD; no GPU is needed.

    python tools/prove/gpu_code.py [CHIP ...]        default: sm_75 sm_80 sm_90 sm_120 gfx942 gfx1100

For NVIDIA the shipped PTX is assembled and taken apart by the tools that come with Triton; for AMD Triton compiles the
sources. A fused multiply-add may stand in a division only, nothing flushes denormals, and what spills is told.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "make"))

from make_ptx import build

from streammerge.backends.fused.specs import kernel_specs, ptx

CHIPS = ["sm_75", "sm_80", "sm_90", "sm_120", "gfx942", "gfx1100"]
_DIVISION_FMAS = 14
"""Most fused multiply-adds of one division in fp64, in line: Newton's steps and the exact remainder."""


def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def nvidia(name: str, chip: str) -> list[str]:
    """Return what is wrong with a shipped kernel's code for a chip; print what it consists of."""
    text = ptx(kernel_specs()[name])
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        source.write_text(text)
        assembler = _tools() / ("ptxas-blackwell" if int(chip[3:]) >= 100 else "ptxas")
        ran = subprocess.run(
            [assembler, "-v", "--gpu-name", chip, source, "-o", binary], capture_output=True, text=True
        )
        if ran.returncode:
            return [f"{chip} {name}: the assembler refuses it: {ran.stderr.strip()[-200:]}"]
        code = subprocess.run(
            [_tools() / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True
        )
    count = {
        one: len(re.findall(rf"\b{one}\b", code.stdout)) for one in ("DFMA", "FFMA", "DADD", "DMUL", "STL")
    }
    registers = re.search(r"Used (\d+) registers", ran.stderr)
    print(f"{chip} {name}: {registers[1] if registers else '?'} registers, {count}", flush=True)
    divisions = len(re.findall(r"div\.rn\.f64", text))
    # Divisions of integers convert with .FTZ, and use FFMA, on integers that fp32 holds.
    flushes = re.search(r"\b(?:FADD|FMUL|FFMA|FSETP|FMNMX|F2F)\.\S*FTZ", code.stdout)
    wrong = [f"{chip} {name}: flushes denormals: {flushes[0]}"] if flushes else []
    if count["DFMA"] > _DIVISION_FMAS * divisions:
        wrong.append(f"{chip} {name}: {count['DFMA']} DFMA for {divisions} divisions")
    return wrong


def amd(name: str, chip: str, kernel: Any) -> list[str]:
    """Return what is wrong with a kernel's code for a chip of AMD; print what it consists of."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("hip", chip, 64 if chip.startswith("gfx9") else 32)
    code = build(kernel, target=target, ptx_version=None).asm["amdgcn"]
    kinds = (r"v_(?:fma|fmac|mad)_f64", "v_add_f64", "v_mul_f64", "v_div_fixup_f64")
    count = {one: len(re.findall(one, code)) for one in kinds}
    print(f"{chip} {name}: {count}", flush=True)
    modes = set(re.findall(r"\.amdhsa_float_denorm_mode_\w+ (\d)", code))
    wrong = [] if modes == {"3"} else [f"{chip} {name}: modes of denormals {modes}"]
    if count[kinds[0]] > _DIVISION_FMAS * count["v_div_fixup_f64"]:
        wrong.append(
            f"{chip} {name}: {count[kinds[0]]} fused multiply-adds for {count['v_div_fixup_f64']} divisions"
        )
    return wrong


def main() -> int:
    """Look at every kernel for every chip, and return 1 if anything is wrong."""
    from streammerge.backends.fused.sources.catalog import FOR_AMD, KERNELS

    wrong = []
    for chip in sys.argv[1:] or CHIPS:
        for name in KERNELS:
            wrong += nvidia(name, chip) if chip.startswith("sm_") else amd(name, chip, FOR_AMD[name])
    print("\n".join(wrong) or "nothing is wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
