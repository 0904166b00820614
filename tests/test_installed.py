"""What is installed is found as by `importlib.metadata`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from streammerge import installed


@pytest.mark.parametrize("package", ["numba", "llvmlite", "numpy", "torch", "no-such-package"])
def test_versions_are_those_of_the_library(package: str) -> None:
    try:
        expected = metadata.version(package)
    except metadata.PackageNotFoundError:
        expected = None
    assert installed.version(package) == expected


@pytest.mark.parametrize("group", ["console_scripts", "streammerge.methods", "no such group"])
def test_entry_points_are_those_of_the_library(group: str) -> None:
    assert installed.entry_points(group) == tuple(metadata.entry_points(group=group))


@pytest.mark.parametrize("ending", ["dist-info", "egg-info"])
def test_a_package_that_is_added_is_found(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert installed.entry_points("streammerge.tests") == ()
    told = tmp_path / f"some_methods-1.0.{ending}"
    told.mkdir()
    told.joinpath("entry_points.txt").write_text("[streammerge.tests]\nmine = some_methods:mine\n")
    told.joinpath("METADATA" if ending == "dist-info" else "PKG-INFO").write_text(
        "Name: some-methods\nVersion: 1.0\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (point,) = installed.entry_points("streammerge.tests")
    assert (point.name, point.value) == ("mine", "some_methods:mine")
    assert installed.version("some-methods") == "1.0"


def test_where_packages_lie_in_archives_the_library_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "packages.zip"
    archive.touch()
    assert installed._only_folders()
    monkeypatch.setattr(sys, "path", [*sys.path, str(archive)])
    assert not installed._only_folders()
