"""The law of the code: the shipped PTX rounds as the CPU does, is what the sources give, and is as its table says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from streammerge.backends.fused.launcher import KernelSpec
from streammerge.backends.fused.specs import kernel_specs, ptx

PROGRAMS = Path(__file__).parents[3] / "tools" / "make"
sys.path.insert(0, str(PROGRAMS))

from make_ptx import FOLDER, findings, sources, table_of  # noqa: E402

SPECS = list(kernel_specs().values())


# --- what is shipped


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_instruction_rounds_otherwise(spec: KernelSpec) -> None:
    text = ptx(spec)
    assert findings(text) == {}
    assert set(re.findall(r"\bdiv\.\w+\.f\d+", text)) <= {"div.rn.f64"}


def test_there_is_arithmetic_to_search() -> None:
    text = "".join(map(ptx, SPECS))
    for instruction in ("mul.rn.f64", "add.rn.f64", "div.rn.f64", "sub.rn.f32", "cvt.rn.f32.f64"):
        assert instruction in text


@pytest.mark.parametrize(
    ("line", "law"),
    [
        ("fma.rn.f64 %rd1, %rd2, %rd3, %rd4;", "a contraction"),
        ("mad.f32 %r1, %r2, %r3, %r4;", "a contraction"),
        ("add.rn.ftz.f32 %r1, %r2, %r3;", "a flush to zero"),
        ("ex2.approx.f32 %r1, %r2;", "an approximation"),
        ("add.f64 %rd1, %rd2, %rd3;", "an operation that may be contracted"),
        ("mul.f32x2 %rd1, %rd2, %rd3;", "an operation that may be contracted"),
        ("div.full.f32 %r1, %r2, %r3;", "a division or root that is not IEEE's of fp64"),
        ("rcp.approx.ftz.f64 %rd1, %rd2;", "a division or root that is not IEEE's of fp64"),
        ("call.uni (retval0), __nv_exp, (param0);", "a call"),
    ],
)
def test_a_forbidden_instruction_is_found(line: str, law: str) -> None:
    allowed = "\tadd.rn.f64 %rd1, %rd2, %rd3;\n\tmad.lo.s64 %rd1, %rd2, %rd3, %rd4;\n\tdiv.rn.f64 %rd1, %rd2, %rd3;\n"
    assert findings(allowed) == {}
    assert law in findings(f"{allowed}\t{line}\n")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_table_says_how_a_kernel_is_launched(spec: KernelSpec) -> None:
    text = ptx(spec)
    assert f".visible .entry {spec.entry}(" in text
    assert f".reqntid {spec.threads}" in text
    assert (
        len(re.findall(rf"\.param \.\w+ .*{spec.entry}_param_\d+[,\n]", text))
        == len(spec.signature) + spec.nulls
    )
    assert (".extern .shared" in text) == (spec.shared > 0)
    assert spec.shared <= 48 << 10  # what a launch may ask for without leave
    assert ".version 7.0" in text
    assert ".target sm_75" in text


def test_the_table_is_of_these_sources_and_this_triton() -> None:
    table = table_of(FOLDER / "ptx")
    assert table["sources"] == sources(), "run tools/make/make_ptx.py after a change of the kernels"
    pinned = re.search(r'"triton==([\d.]+)"', (PROGRAMS.parents[1] / "pyproject.toml").read_text())
    assert pinned is not None
    assert table["triton"] == pinned[1]
    assert {path.name for path in (FOLDER / "ptx").glob("*.ptx")} == {spec.file for spec in SPECS}


# --- what Triton makes of the sources


def test_the_shipped_ptx_is_a_rebuild_and_the_search_finds_contractions(tmp_path: Path) -> None:
    """Triton's assembler, which is NVIDIA's, accepts each kernel on the way."""
    pytest.importorskip("triton")
    assert version("triton") == table_of(FOLDER / "ptx")["triton"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(PROGRAMS / "make_ptx.py"), "--check", "--fusion", "task_vectors_elect"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert "changed: none" in ran.stdout
    assert re.search(r"with fusion, task_vectors_elect: .*a contraction.*may be contracted", ran.stdout)


# --- parameters


def test_parameters_have_the_widths_of_the_signature_and_end_with_null_pointers() -> None:
    spec = KernelSpec("k", "k.ptx", "k", ("i64", "i32"), 2, 128, 0, 1024)
    parameters = spec.parameters([1 << 40, -1])
    assert [(one.itemsize, int(one)) for one in parameters] == [(8, 1 << 40), (4, -1), (8, 0), (8, 0)]
    assert [spec.programs(n) for n in (0, 1, 1024, 1025)] == [1, 1, 1, 2]
    with pytest.raises(ValueError, match="shorter"):
        spec.parameters([1])
    with pytest.raises(OverflowError):
        spec.parameters([1, 1 << 31])
