"""NaN and infinity: refused, or with `nonfinite: warn` written at their own elements alone, and reported."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from streammerge.api import merge
from streammerge.cli import cli
from streammerge.errors import ModelError, Stopped
from streammerge.events import Event
from tests.conftest import config_for, output_bytes, read_tensors, write_models
from tests.laws.test_methods import VARIANTS

NAN, INF = float("nan"), float("inf")
PLANTED = {
    "model.embed_tokens.weight": {7: NAN, 5000: INF, 44_000: -INF},
    "model.layers.0.mlp.down_proj.weight": {0: NAN},
}


def plant(model: Path, values: dict[str, dict[int, float]] = PLANTED) -> None:
    tensors = load_file(model / "model.safetensors")
    for name, elements in values.items():
        for element, value in elements.items():
            tensors[name].view(-1)[element] = value
    save_file(tensors, model / "model.safetensors")


def warnings_of(config: Any, out: Path, **options: Any) -> list[str]:
    events: list[Event] = []
    merge(config, out, nonfinite="warn", on_event=events.append, **options)
    return [event.values["message"] for event in events if event.kind == "warning"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models, one of which holds values that are not finite."""
    paths = write_models(tmp_path_factory.mktemp("planted"))
    plant(paths[1])
    return paths


@pytest.mark.parametrize(("method", "parameters"), VARIANTS)
def test_only_the_elements_concerned_are_not_finite_whatever_the_method_and_the_pieces(
    method: str,
    parameters: dict[str, Any],
    planted: list[Path],
    small_capacity: Callable[[int, int], None],
    tmp_path: Path,
) -> None:
    config = config_for(method, planted, parameters=parameters, seed=7)
    small_capacity(1 << 30, 2)
    warnings_of(config, tmp_path / "whole")
    warnings_of(config, tmp_path / "torch", kernels=False)
    small_capacity(1 << 23, 3)
    warnings_of(config, tmp_path / "cut")
    expected = output_bytes(tmp_path / "whole")
    assert output_bytes(tmp_path / "torch") == expected
    assert output_bytes(tmp_path / "cut") == expected
    for name, tensor in read_tensors(tmp_path / "whole").items():
        found = set((~torch.isfinite(tensor.view(-1))).nonzero().flatten().tolist())
        assert found == set(PLANTED.get(name, {})), name
    recorded = json.loads((tmp_path / "whole" / "streammerge.json").read_text())["not_finite"]
    assert recorded == {name: len(elements) for name, elements in PLANTED.items()}


def test_statistics_over_more_infinities_than_they_are_to_keep_still_have_an_answer(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, model = make_models(n_models=1, shapes={"w": (100, 64)})
    plant(model, {"w": dict.fromkeys(range(100), INF)})
    config = config_for("ties", [base, model], parameters={"density": 0.01})
    warnings_of(config, tmp_path / "out")
    merged, start = read_tensors(tmp_path / "out")["w"].view(-1), read_tensors(base)["w"].view(-1)
    assert torch.isinf(merged[:100]).all()
    assert torch.equal(merged[100:], start[100:])


def test_the_warning_names_tensor_file_count_and_first_element(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models()
    plant(paths[2])
    lines = warnings_of(config_for("task_arithmetic", paths), tmp_path / "out")
    assert sorted(lines) == sorted(
        f"tensor {name}: {len(elements)} elements of {paths[2] / 'model.safetensors'} are NaN or infinite (the first is "
        f"{min(elements)}), and so are those of the output"
        for name, elements in PLANTED.items()
    )


def test_an_overflow_is_told_from_an_infinity_of_the_input(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(dtype=torch.float32, shapes={"w": (10, 10)})
    for path in paths:
        plant(path, {"w": dict.fromkeys((30, 31, 99), 7e4)})
    plant(paths[1], {"w": {31: INF}})
    config = config_for("linear", paths, dtype="float16")
    lines = warnings_of(config, tmp_path / "out")
    assert [line.split(": ", 1)[1] for line in lines] == [
        f"1 elements of {paths[1] / 'model.safetensors'} are NaN or infinite (the first is 31), and so are those of the output",
        "2 merged elements overflow F16 (the first is 30)",
    ]
    with pytest.raises(ModelError, match=r"holds NaN or infinity at element 31 .*: .* --nonfinite warn"):
        merge(config, tmp_path / "refused")
    plant(paths[1], {"w": {31: 0.0}})
    with pytest.raises(ModelError, match=r"overflow F16 at element 30 .*: .* --nonfinite warn"):
        merge(config, tmp_path / "refused", overwrite=True)


def test_a_merge_that_was_refused_goes_on_with_warn_and_back(
    make_models: Callable[..., list[Path]], small_capacity: Callable[[int, int], None], tmp_path: Path
) -> None:
    paths = make_models()
    plant(paths[1])
    small_capacity(1 << 17, 1)
    config, out = config_for("linear", paths), tmp_path / "out"
    with pytest.raises(ModelError):
        merge(config, out)
    stop = threading.Event()

    def stop_late(event: Event) -> None:
        if event.kind == "progress" and event.values["elements"] > 60_000:
            stop.set()

    try:
        merge(
            config,
            out,
            nonfinite="warn",
            stop=stop,
            on_event=stop_late,
            signal_received=lambda: 15 if stop.is_set() else None,
        )
    except Stopped:
        # A non-finite value is not believed where it is an error.
        with pytest.raises(ModelError):
            merge(config, out)
    warnings_of(config, out)
    warnings_of(config, tmp_path / "at once")
    assert output_bytes(out) == output_bytes(tmp_path / "at once")


def test_a_bad_fisher_diagonal_is_refused_all_the_same(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    config = config_for("fisher", make_models())
    diagonal = Path(config["models"][0]["fisher"])
    fisher = load_file(diagonal)
    fisher["model.embed_tokens.weight"].view(-1)[17] = -1.0
    save_file(fisher, diagonal)
    with pytest.raises(ModelError, match=r"Fisher diagonal of .* at element 17"):
        merge(config, tmp_path / "out", nonfinite="warn")


def test_the_command_goes_on_where_it_is_told_to(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models()
    plant(paths[1])
    (tmp_path / "c.yml").write_text(json.dumps(config_for("linear", paths)))
    arguments = [
        "merge",
        str(tmp_path / "c.yml"),
        str(tmp_path / "out"),
        "--memory",
        "512MiB",
        "--device",
        "cpu",
    ]
    refused = CliRunner().invoke(cli, arguments)
    assert isinstance(refused.exception, ModelError)
    done = CliRunner().invoke(cli, [*arguments, "--nonfinite", "warn"])
    assert done.exit_code == 0
    assert done.output.count("warning: tensor ") == len(PLANTED)
    assert np.isnan(read_tensors(tmp_path / "out")["model.embed_tokens.weight"].view(-1)[7].item())
