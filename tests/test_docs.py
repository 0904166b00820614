"""The documentation is true: the YAML parses, the example method runs, every command is described."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import click
import pytest

import streammerge
from streammerge.api import merge
from streammerge.cli.entry import cli
from streammerge.config import MergeConfig, parse_config
from streammerge.estimate.fisher.importing import import_diagonal
from tests.checkpoint.adapters.scene import factors, write_adapter
from tests.checkpoint.tokenizers.scene import write_tokenizer
from tests.conftest import read_tensors, write_fisher, write_grams, write_model
from tests.planning.moe.dense import write_experts

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (f"{page.name}:{i}", text)
        for page in PAGES
        for i, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    ]


@pytest.mark.parametrize(("place", "text"), blocks("yaml"), ids=lambda value: str(value)[:40])
def test_every_config_in_the_docs_is_accepted(place: str, text: str) -> None:
    config = parse_config(text, place)
    assert config.models or config.checkpoints


def shapes_for(config: MergeConfig) -> dict[str, Any]:
    """Return the shapes of models with the layers, and the stacks of them, that slices and modules speak of."""
    if config.quantize == "fp8":
        return {"shapes": {"model.layers.0.mlp.up_proj.weight": (128, 128)}}
    if config.lora is not None:
        return {"shapes": {"model.layers.0.mlp.up_proj.weight": (16, 12), "model.norm.weight": (12,)}}
    if not any(module.is_sliced for module in config.modules):
        return {}
    shapes = {f"model.layers.{i}.w": (4, 4) for i in range(32)} | {"model.norm.weight": (4,)}
    vision = {f"vision_tower.layers.{i}.w": (4, 4) for i in range(2)} if len(config.modules) > 1 else {}
    return {"shapes": {**shapes, **vision}}


@pytest.mark.parametrize(("place", "text"), blocks("yaml"), ids=lambda value: str(value)[:40])
def test_every_config_in_the_docs_runs_on_models_of_these_names(
    place: str,
    text: str,
    make_models: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first model the text names is the base; a store is made for each `fisher`."""
    monkeypatch.chdir(tmp_path)
    config = parse_config(text, place)
    documents = (config, *config.stages)
    stages = {document.name for document in documents}
    references = [document.base_model for document in documents if document.base_model]
    references += [spec.reference for document in documents for spec in document.models]
    asked = config.checkpoints
    runs = [] if asked is None else [f"{asked.places[0]}/checkpoint-{i}" for i in range(asked.last or 3)]
    names = dict.fromkeys([*runs, *(name for name in references if name not in stages)])
    adapters = {name.partition("+")[2] for name in names if "+" in name}
    names = dict.fromkeys(name.partition("+")[0] for name in names)
    if config.moe is not None:
        write_experts(list(names), [text for expert in config.moe.every for text in expert.prompts])
        Path("config.yml").write_text(text)
        assert merge("config.yml", "out", memory="1GiB").tensors
        return
    for source, name in zip(make_models(n_models=len(names) - 1, **shapes_for(config)), names, strict=True):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        source.rename(name)
        strips = {spec.reference: spec.strip for spec in config.models}
        if prefix := strips.get(name, "" if asked is None else asked.strip):
            write_model(Path(name), {prefix + n: t for n, t in read_tensors(Path(name)).items()})
        if config.tokenizer is not None:
            write_tokenizer(Path(name), {"<s>": 0, "</s>": 1, "<|im_start|>": 2})
    for seed, adapter in enumerate(sorted(adapters)):
        matrix, shape = next(
            (n, t.shape) for n, t in read_tensors(Path(next(iter(names)))).items() if t.dim() == 2
        )
        write_adapter(Path(adapter), factors(matrix.removesuffix(".weight"), shape[1], shape[0], 8, seed))
    for spec in config.models:
        if spec.fisher:
            import_diagonal(spec.reference, write_fisher(Path(spec.reference)), Path(spec.fisher))
        if spec.gram:
            write_grams(Path(spec.reference)).rename(spec.gram)
    Path("config.yml").write_text(text)
    if config.sweep:
        assert streammerge.sweep("config.yml", "out", memory="1GiB").bytes_written
        return
    merge("config.yml", "out", memory="1GiB")
    assert read_tensors(Path("out")) if config.lora is None else Path("out/adapter_config.json").exists()


PYTHON_PAGE = "python.md"
"""Its blocks go on from one another, with the models that it names."""
NEED_MODELS = (PYTHON_PAGE, "README.md")
"""Their blocks are run by tests of their own, README's by tests/test_readme.py."""


@pytest.mark.parametrize(
    ("place", "text"),
    [(place, text) for place, text in blocks("python") if not place.startswith(NEED_MODELS)],
    ids=lambda value: str(value)[:40],
)
def test_every_python_block_in_the_docs_runs(place: str, text: str) -> None:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "text",
    [text for place, text in blocks("python") if place.startswith("extending.md") and text.startswith("# ")],
    ids=lambda text: text.split("\n", 1)[0][2:],
)
def test_every_method_of_the_page_on_extending_keeps_the_laws(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.methods import registry
    from streammerge.testing import check_method

    monkeypatch.setattr(registry, "_METHODS", dict(registry.all_methods()))
    file = tmp_path / text.split("\n", 1)[0][2:]
    file.write_text(text)
    check_method(file, peak=False, dtypes=["bfloat16"])


def test_the_python_page_runs_from_its_beginning_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.estimate.network.tiny import make_lines, make_model, write_lines

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math", "code")):
        make_model("llama", tmp_path / "models" / f"llama-{name}", seed=seed)
    write_lines(tmp_path / "examples.jsonl", make_lines(4))
    write_fisher(tmp_path / "models" / "llama-code").rename("code-fisher.safetensors")
    names: dict[str, Any] = {"__name__": "page"}
    for place, text in blocks("python"):
        if place.startswith(PYTHON_PAGE):
            exec(compile(text, place, "exec", dont_inherit=True), names)
    assert read_tensors(tmp_path / "merged").keys() == read_tensors(tmp_path / "third").keys()
    assert {name for name in streammerge.__all__ if isinstance(getattr(streammerge, name), FunctionType)} <= {
        word for _, text in blocks("python") for word in re.findall(r"streammerge\.(\w+)", text)
    }


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's titles, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_between_the_docs_leads_to_a_file_and_a_title() -> None:
    for page in (*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"):
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            place = page.parent / target if target else page
            assert place.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(place), f"{page.name}: {target}#{anchor}"


def test_readme_names_every_builtin_method() -> None:
    from streammerge.methods.catalog import load_builtin
    from streammerge.methods.registry import all_methods

    load_builtin()
    table = (ROOT / "README.md").read_text()
    pages = next(page for page in PAGES if page.name == "methods.md").read_text()
    for name, method in all_methods().items():
        if method.origin == "built in":
            assert f"`{name}`" in table
            assert name in pages


def commands() -> list[str]:
    """Return every line of a block that calls the program, and every call within a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            found += (
                []
                if language
                else [line.removeprefix("$ ") for line in block.splitlines() if "streammerge " in line]
            )
        found += re.findall(r"`(streammerge [a-z][^`\n]*)`", text)
    return [line for line in dict.fromkeys(found) if line.startswith("streammerge ")]


def test_every_command_in_the_docs_has_these_options() -> None:
    assert len(commands()) > 40
    for line in commands():
        _, *words = shlex.split(re.split(r" [>|] ", line)[0], comments=True)
        command: click.Command = cli
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        known |= {"-h", "--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"} <= known, (
            line
        )


def test_the_page_of_the_command_line_lists_every_command() -> None:
    table = next(page for page in PAGES if page.name == "cli.md").read_text()
    assert {name for name in cli.commands if not re.search(rf"\| `{name}\b", table)} == set()


def test_every_file_that_the_docs_speak_of_is_there() -> None:
    for page in PAGES:
        named = re.findall(
            r"\b((?:tools|tests|docs|streammerge)/[\w./-]*\w\.(?:py|md|png|svg))\b", page.read_text()
        )
        assert [name for name in named if not (ROOT / name).exists()] == [], page.name
