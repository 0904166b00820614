"""The model card: what the hub reads of it is true, and no path of this machine is in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from streammerge.api import merge, plan
from streammerge.checkpoint.index import open_model
from streammerge.output.manifest import load_manifest
from streammerge.planning.files.origins import origins_of, shared_licence
from streammerge.report.card import model_card
from tests.conftest import write_model

TENSORS = {"layers.0.q_proj.weight": torch.ones(4, 4)}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models, relative to it too, and a cache with two of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("exp/7/math", "exp/7/code", "org/local"):
        write_model(tmp_path / name, TENSORS)
    for name, number in (("org/a", 1), ("org/b-1.5", 2)):
        repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        write_model(repository / "snapshots" / f"{number:040d}", TENSORS)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(f"{number:040d}")
    return tmp_path


def snapshot(home: Path, name: str) -> Path:
    return next((home / "cache" / f"models--{name.replace('/', '--')}" / "snapshots").iterdir())


def config_of(*models: str, method: str = "linear", **more: Any) -> dict[str, Any]:
    listed = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": method, "dtype": "float32", "models": listed, **more}


def card_of(*models: str, **more: Any) -> str:
    return model_card(plan(config_of(*models, **more), memory="1GiB"))


def front_of(card: str) -> dict[str, Any]:
    loaded = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (("exp/7/math", "exp/7/code"), None),
        (("./exp/7/math", "org/local"), None),
        (("org/a", "exp/7/code"), ["org/a"]),
        (("org/a", "org/b-1.5"), ["org/a", "org/b-1.5"]),
        ((f"org/a@{1:040d}", "org/local"), ["org/a"]),
    ],
)
def test_base_model_lists_hub_names_only(
    models: tuple[str, ...], expected: list[str] | None, home: Path
) -> None:
    front = front_of(card_of(*models))
    assert front.get("base_model") == expected
    assert front["base_model_relation"] == "merge"
    assert front["tags"] == ["merge", "streammerge", "linear"]


def test_a_snapshot_given_by_its_path_is_a_local_folder(home: Path) -> None:
    card = card_of(str(snapshot(home, "org/a")), "org/b-1.5")
    assert front_of(card)["base_model"] == ["org/b-1.5"]


def test_an_adapter_is_a_repository_of_its_own(home: Path) -> None:
    from safetensors.torch import save_file

    directory = snapshot(home, "org/b-1.5")
    (directory / "model.safetensors").unlink()
    (directory / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    )
    part = "base_model.model.layers.0.q_proj.lora_"
    save_file(
        {f"{part}A.weight": torch.ones(2, 4), f"{part}B.weight": torch.ones(4, 2)},
        directory / "adapter_model.safetensors",
    )
    card = card_of("org/a+org/b-1.5", "exp/7/code")
    assert front_of(card)["base_model"] == ["org/a", "org/b-1.5"]
    assert "[org/a](https://huggingface.co/org/a/tree/" in card


@pytest.mark.parametrize(
    "text", ["license: mit", 'license: "mit"  ', "tags:\n- x\nlicense:\n- mit", "license: mit\r\nmodel: x"]
)
def test_a_licence_that_all_inputs_state_is_stated(text: str, home: Path) -> None:
    for name in ("exp/7/math", "exp/7/code"):
        (home / name / "README.md").write_bytes(f"---\n{text}\n---\n# x\n".encode())
    assert front_of(card_of("exp/7/math", "exp/7/code"))["license"] == "mit"
    (home / "exp/7/code" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert "license" not in front_of(card_of("exp/7/math", "exp/7/code"))
    (home / "exp/7/code" / "README.md").unlink()
    assert "license" not in front_of(card_of("exp/7/math", "exp/7/code"))


def test_a_licence_of_its_own_name_is_taken_whole(home: Path) -> None:
    text = "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://x.org/terms\n---\n"
    for name in ("exp/7/math", "exp/7/code"):
        (home / name / "README.md").write_text(text)
    front = front_of(card_of("exp/7/math", "exp/7/code"))
    assert (front["license"], front["license_name"], front["license_link"]) == (
        "other",
        "gemma",
        "https://x.org/terms",
    )


@pytest.mark.parametrize(
    "text",
    [
        "license: mit",
        "---\nlicense: &a mit\n---\n",
        "---\nlicense: !!python/object:os.system x\n---\n",
        "---\nlicense: [a, b]\n---\n",
        "---\nlicense: a\x1b[31m\n---\n",
        "---\n" + "x" * 10**6 + "\nlicense: mit\n---\n",
        "\xff\xfe",
        "---\n" * 10**5,
    ],
)
def test_a_readme_that_states_none_plainly_states_none(text: str, home: Path) -> None:
    (home / "exp/7/math" / "README.md").write_text(text, encoding="latin1")
    assert shared_licence(origins_of(open_model("exp/7/math"))) == ()


def test_a_readme_that_is_a_link_out_of_the_folder_is_not_read(home: Path) -> None:
    (home / "secret").write_text("---\nlicense: mit\n---\n")
    (home / "exp/7/math" / "README.md").symlink_to(home / "secret")
    assert shared_licence(origins_of(open_model("exp/7/math"))) == ()


def test_no_path_of_this_machine_is_published_and_the_config_stays_word_for_word(home: Path) -> None:
    text = (
        f"# my own, in {home}/notes/x.txt\nmerge_method: linear\ndtype: float32\nmodels:\n"
        f"  - model: {home}/exp/7/math\n    parameters: {{weight: 0.5}}\n"
        "  - model: ../"
        f"{home.name}/exp/7/code\n    parameters: {{weight: [0.1, 0.5]}}\n"
    )
    (home / "c.yml").write_text(text)
    merge("c.yml", "out")
    card = (home / "out" / "README.md").read_text()
    assert str(home) not in card
    assert home.name not in card
    assert "model: math" in card
    assert "# my own, in x.txt" in card
    assert (home / "out" / "streammerge_config.yml").read_text() == text
    assert "| `code` | `weight` | `[0.1, 0.5]` |" in card


def test_hub_names_and_addresses_stay_in_the_config(home: Path) -> None:
    (home / "c.yml").write_text(
        "# see https://x.org/a/b.html\nmerge_method: linear\nmodels:\n- {model: org/a, parameters: {weight: 1}}\n"
    )
    card = model_card(plan("c.yml"))
    assert "https://x.org/a/b.html" in card
    assert "{model: org/a, parameters" in card


LIBRARIES: list[tuple[dict[str, Any], str | None, str]] = [
    (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        "transformers",
        "AutoModelForCausalLM.from_pretrained",
    ),
    (
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        "transformers",
        "AutoModelForSeq2SeqLM",
    ),
    ({"_class_name": "UNet", "_diffusers_version": "1"}, "diffusers", "from diffusers import UNet"),
    (
        {"_class_name": "x\nimport os", "_diffusers_version": "1"},
        "diffusers",
        "from diffusers import AutoModel",
    ),
    ({"architecture": "vit", "num_features": 3}, "timm", "timm.create_model"),
    ({}, None, "# A merge by linear"),
]


@pytest.mark.parametrize(("config", "library", "words"), LIBRARIES)
def test_the_library_and_how_it_loads_are_those_of_the_inputs(
    config: dict[str, Any], library: str | None, words: str, home: Path
) -> None:
    for model in ("math", "code") if not config else ("math",):
        (home / "exp/7" / model / "config.json").write_text(json.dumps(config))
    card = card_of("exp/7/math", "exp/7/code")
    assert front_of(card).get("library_name") == library
    assert words in card


def test_the_seed_is_told_where_something_is_drawn(home: Path) -> None:
    config = config_of("exp/7/math", method="dare_linear", base_model="exp/7/code", seed=5)
    config["models"][0]["parameters"]["density"] = 0.5
    assert "from the seed 5" in model_card(plan(config))
    assert "seed" not in card_of("exp/7/math", "exp/7/code")


def test_the_manifest_names_the_inputs_for_people(home: Path) -> None:
    merge(config_of("org/a", f"{home}/exp/7/code"), "out")
    assert [entry["name"] for entry in load_manifest(home / "out")["inputs"]] == [f"org/a@{1:040d}", "code"]
    assert str(home) not in (home / "out" / "streammerge.json").read_text()


def test_the_card_does_not_depend_on_where_things_lie(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = card_of("org/a", "exp/7/code")
    there = home / "there"
    there.mkdir()
    for name in ("cache", "exp"):
        os.rename(home / name, there / name)
    monkeypatch.chdir(there)
    monkeypatch.setenv("HF_HUB_CACHE", str(there / "cache"))
    assert card_of("org/a", "exp/7/code") == before
