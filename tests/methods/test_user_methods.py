"""Merge methods of a user's own, from a file."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.algebra.extent import Extent
from streammerge.api import merge, plan
from streammerge.errors import BudgetError, InputError, StreammergeError
from streammerge.methods import catalog, registry
from tests.conftest import config_for, output_bytes, read_tensors
from tests.laws.test_methods import VARIANTS

METHODS = """
import torch
import streammerge
from streammerge import PerModel

@streammerge.method("my_midpoint", base="required")
def my_midpoint(models, base, *, t: float = 0.5, weight: PerModel[float] = 1.0):
    '''Step from the base towards the weighted mean.'''
    mean = sum(w * m for w, m in zip(weight, models)) / sum(weight)
    return base + t * (mean - base)

@streammerge.method("my_rows", access="row", base="none")
def my_rows(models, base, *, eps: float = 1e-6):
    '''The mean, each row scaled to the mean norm of the inputs' rows.'''
    mean = sum(models) / len(models)
    norm = sum(m.norm(dim=-1, keepdim=True) for m in models) / len(models)
    return mean / (mean.norm(dim=-1, keepdim=True) + eps) * norm

@streammerge.method("my_tensor", access="tensor", base="none")
def my_tensor(models, base, *, scale: float = 1.0):
    '''The mean, scaled to the largest magnitude of the first model.'''
    mean = sum(models) / len(models)
    return scale * mean * (models[0].abs().amax() / mean.abs().amax().clamp_min(1e-12))

@streammerge.method("my_wrong_shape", base="none")
def my_wrong_shape(models, base):
    '''Too few elements.'''
    return models[0].reshape(-1)[:1]

@streammerge.method("my_nothing", base="none")
def my_nothing(models, base):
    '''No tensor at all.'''
    return None
"""
SHAPES: dict[str, tuple[int, ...]] = {"embed": (600, 64), "a.weight": (96, 130), "norm": (64,), "scalar": ()}


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    catalog.load_builtin()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    path = tmp_path / "my_methods.py"
    path.write_text(METHODS)
    return path


@pytest.fixture
def paths(make_models: Callable[..., list[Path]]) -> list[Path]:
    return make_models(shapes=SHAPES, dtype=torch.float32)


def config_of(method: str, paths: list[Path], **parameters: Any) -> dict[str, Any]:
    config = config_for(method, paths, parameters=parameters)
    if method != "my_midpoint":
        config.pop("base_model", None)
    return config


def test_an_elementwise_formula_does_what_it_says(paths: list[Path], methods: Path, tmp_path: Path) -> None:
    config = config_of("my_midpoint", paths, t=0.25, weight=2.0)
    merge(config, tmp_path / "out", methods=methods)
    merged, base, *models = (read_tensors(p) for p in (tmp_path / "out", *paths))
    for name in SHAPES:
        mean = sum(model[name] for model in models) / len(models)
        torch.testing.assert_close(merged[name], base[name] + 0.25 * (mean - base[name]))


def test_a_row_formula_sees_whole_rows(paths: list[Path], methods: Path, tmp_path: Path) -> None:
    merge(config_of("my_rows", paths), tmp_path / "out", methods=methods)
    merged, *models = (read_tensors(p) for p in (tmp_path / "out", *paths[1:]))
    for name in ("embed", "a.weight"):
        norms = sum(model[name].norm(dim=-1) for model in models) / len(models)
        torch.testing.assert_close(merged[name].norm(dim=-1), norms, rtol=1e-3, atol=1e-4)


def test_a_tensor_formula_sees_the_whole_tensor(paths: list[Path], methods: Path, tmp_path: Path) -> None:
    merge(config_of("my_tensor", paths), tmp_path / "out", methods=methods)
    merged, first = read_tensors(tmp_path / "out"), read_tensors(paths[1])
    for name in SHAPES:
        torch.testing.assert_close(merged[name].abs().max(), first[name].abs().max())


@pytest.mark.parametrize("method", ["my_midpoint", "my_rows", "my_tensor"])
def test_the_bytes_of_a_formula_do_not_depend_on_memory_or_threads(
    method: str, paths: list[Path], methods: Path, small_capacity: Callable[[int, int], None], tmp_path: Path
) -> None:
    small_capacity(1 << 30, 1)
    merge(config_of(method, paths), tmp_path / "whole", methods=methods)
    # Many workers make the chunks small: the embedding is cut into several.
    small_capacity(1 << 23, 40)
    merge(config_of(method, paths), tmp_path / "cut", methods=methods)
    assert output_bytes(tmp_path / "cut") == output_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "word"), [("my_wrong_shape", "not a tensor of shape"), ("my_nothing", "NoneType")]
)
def test_a_formula_that_returns_something_else_is_one_line_with_the_tensor(
    method: str, word: str, paths: list[Path], methods: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=word) as caught:
        merge(config_of(method, paths), tmp_path / "out", methods=methods)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_name_that_a_builtin_method_has_is_refused(
    paths: list[Path], methods: Path, tmp_path: Path
) -> None:
    methods.write_text(METHODS.replace("my_midpoint", "ties"))
    with pytest.raises(InputError, match=r"'ties'.*taken by a built-in"):
        merge(config_of("my_rows", paths), tmp_path / "out", methods=methods)
    assert registry.get_method("ties").origin == "built in"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("def (:", "SyntaxError"),
        ("1 / 0", "ZeroDivision"),
    ],
)
def test_a_file_that_cannot_be_run_is_one_line(
    text: str, word: str, paths: list[Path], methods: Path, tmp_path: Path
) -> None:
    methods.write_text(text)
    with pytest.raises(InputError, match=word) as caught:
        merge(config_of("my_rows", paths), tmp_path / "out", methods=methods)
    assert "my_methods.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(StreammergeError, match=r"none\.py"):
        plan(config_of("my_rows", paths), methods=tmp_path / "none.py")


def test_a_whole_tensor_that_does_not_fit_is_refused_with_both_numbers(
    paths: list[Path], methods: Path, small_capacity: Callable[[int, int], None], tmp_path: Path
) -> None:
    small_capacity(1 << 19, 1)
    with pytest.raises(
        BudgetError, match=r"(embed|a\.weight): .*the whole tensor, .*iB.*leaves 512 KiB.*at least .*iB"
    ):
        merge(config_of("my_tensor", paths), tmp_path / "out", methods=methods)
    assert not (tmp_path / "out").exists()


def test_a_parameter_the_formula_does_not_declare_is_refused(
    paths: list[Path], methods: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"unknown parameter 'tt'"):
        plan(config_of("my_midpoint", paths, tt=1), methods=methods)


def test_without_the_file_the_method_is_unknown(paths: list[Path]) -> None:
    with pytest.raises(InputError, match="unknown method 'my_tensor'"):
        plan(config_of("my_tensor", paths))


def test_an_installed_package_adds_methods_through_its_entry_point(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from importlib.metadata import EntryPoint

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    (tmp_path / "my_installed_methods.py").write_text(
        "import streammerge\n"
        "@streammerge.method('installed_one')\n"
        "def installed_one(models, base):\n"
        "    return models[0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("mine", "my_installed_methods", "streammerge.methods")
    monkeypatch.setattr(catalog, "entry_points", lambda group: [point])
    catalog.load_builtin()
    assert "installed_one" in registry.all_methods()
    broken = EntryPoint("broken", "no_such_module_here", "streammerge.methods")
    monkeypatch.setattr(catalog, "entry_points", lambda group: [broken])
    with pytest.raises(InputError, match="broken"):
        catalog.load_builtin()


# --- the same bits on any number of threads


@pytest.mark.parametrize(
    "expression", ["models[0] @ models[1].T @ models[0]", "models[0] - models[1].mean()"]
)
def test_the_bytes_of_sums_and_products_do_not_depend_on_torchs_threads(
    expression: str, make_models: Callable[..., list[Path]], methods: Path, tmp_path: Path
) -> None:
    paths = make_models(shapes={"a.weight": (300, 1100)}, dtype=torch.float32)
    methods.write_text(
        "import streammerge\n"
        "@streammerge.method('my_sums', access='tensor', base='none')\n"
        f"def my_sums(models, base):\n    return {expression}\n"
    )
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            merge(config_of("my_sums", paths), tmp_path / f"{threads}", methods=methods)
            assert torch.get_num_threads() == threads
            outputs.append(output_bytes(tmp_path / f"{threads}"))
    finally:
        torch.set_num_threads(before)
    assert outputs[0] == outputs[1]


# --- which code a method is

HELPED = """
import streammerge

@streammerge.method("my_helped", base="none")
def my_helped(models, base):
    from helper_of_mine import scale
    return models[0] * scale()
"""


@pytest.fixture
def helped(methods: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a method that imports a module, which imports another."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("helper_of_mine", "helper_of_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    methods.write_text(HELPED)
    methods.with_name("helper_of_mine.py").write_text(
        "from helper_of_helper import two\ndef scale():\n    return two / 2\n"
    )
    methods.with_name("helper_of_helper.py").write_text("two = 2.0\n")
    return methods


def test_a_method_is_all_local_files_that_it_imports(helped: Path, paths: list[Path]) -> None:
    identity = plan(config_of("my_helped", paths), methods=helped).identity()
    assert {"method module helper_of_mine", "method module helper_of_helper"} <= set(identity)
    assert not any("torch" in name or "streammerge" in name for name in identity)


@pytest.mark.parametrize("name", ["helper_of_mine", "helper_of_helper"])
def test_a_finished_merge_is_not_taken_for_one_by_other_helpers(
    name: str, helped: Path, paths: list[Path], tmp_path: Path
) -> None:
    out, config = tmp_path / "out", config_of("my_helped", paths)
    merge(config, out, methods=helped)
    assert merge(config, out, methods=helped).already_complete
    with helped.with_name(f"{name}.py").open("a") as file:
        file.write("two = 4.0\n")
    with pytest.raises(StreammergeError, match=f"method module {name}"):
        merge(config, out, methods=helped)
    merge(config, out, methods=helped, overwrite=True)
    changed = read_tensors(out)["embed"]
    expected = read_tensors(paths[1])["embed"] * 2.0
    assert torch.equal(changed, expected), "a module that was edited is imported anew"


def test_a_plan_with_a_users_method_goes_through_pickle(helped: Path, paths: list[Path]) -> None:
    decided = plan(config_of("my_helped", paths), methods=helped)
    packed = pickle.dumps(decided)
    del registry._METHODS["my_helped"]
    again = pickle.loads(packed)
    assert again.identity() == decided.identity()
    assert again.method.origin == "user_methods_my_methods"
    helped.with_name("helper_of_helper.py").write_text("two = 8.0\n")
    with pytest.raises(InputError, match=r"'my_helped' has changed .*\(method module helper_of_helper\)"):
        pickle.loads(packed)


def test_a_plan_with_a_builtin_method_goes_through_pickle(paths: list[Path]) -> None:
    decided = plan(config_for("slerp", paths[:2], parameters={"t": 0.5}))
    again = pickle.loads(pickle.dumps(decided))
    assert again.method is decided.method
    assert pickle.loads(pickle.dumps(registry.REQUIRED)) is registry.REQUIRED


def test_a_method_without_a_file_is_its_code(methods: Path) -> None:
    found = []
    for number in (1.0, 2.0):
        space: dict[str, Any] = {"streammerge": streammerge, "__name__": "somewhere"}
        exec(
            "@streammerge.method('of_no_file', base='none')\n"
            f"def of_no_file(models, base):\n    return models[0] * {number}\n",
            space,
        )
        found.append(registry.get_method("of_no_file").fingerprint)
    assert found[0] != found[1]


# --- refused when it is registered, or named when it fails


@pytest.mark.parametrize(
    ("decorator", "signature", "words"),
    [
        ("access='model'", "models, base", r"access=\"model\" .* access=\"tensor\""),
        ("", "models, base, x=1", r"parameter 'x'; put a \* before it: def f\(models, base, \*, x=…\)"),
        ("", "context, x=1", r"parameter 'x'; put a \* before it: def f\(context, \*, x=…\)"),
        ("", "models, base, **more", r"\*\*more"),
        ("", "models, base, *more", r"\*more"),
        ("", "models", "takes models, base"),
        ("", "", "takes context"),
    ],
)
def test_what_no_config_could_use_is_refused_when_it_is_registered(
    decorator: str, signature: str, words: str, methods: Path, paths: list[Path]
) -> None:
    methods.write_text(
        f"import streammerge\n@streammerge.method('odd', {decorator})\ndef odd({signature}):\n    return None\n"
    )
    with pytest.raises(InputError, match=words) as caught:
        plan(config_of("odd", paths), methods=methods)
    assert str(caught.value).startswith("method 'odd': ")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return models[0].int()", r"^method 'odd': tensor \S+: returned int32 numbers"),
        ("return models[0][:0]", r"^method 'odd': tensor \S+: returned \(0,\), not a tensor of shape"),
        (
            "raise ValueError('no\\nsuch thing')",
            r"^method 'odd' failed on tensor \S+: ValueError: no\\nsuch thing \(STREAMMERGE_DEBUG=1 for the traceback\)$",
        ),
        ("models[7]", r"^method 'odd' failed on tensor \S+: IndexError"),
        ("raise streammerge.errors.ModelError('x.safetensors: bad')", r"^x\.safetensors: bad$"),
    ],
)
def test_a_method_that_fails_is_one_line_that_names_it_and_the_tensor(
    body: str, words: str, methods: Path, paths: list[Path], tmp_path: Path
) -> None:
    methods.write_text(
        "import streammerge, streammerge.errors\n@streammerge.method('odd', base='none')\n"
        f"def odd(models, base):\n    {body}\n"
    )
    with pytest.raises(InputError, match=words) as caught:
        merge(config_of("odd", paths), tmp_path / "out", methods=methods)
    assert caught.value.exit_code == 2


def test_a_method_that_chooses_a_rule_and_fails_is_named_too(methods: Path, paths: list[Path]) -> None:
    methods.write_text(
        "import streammerge\n@streammerge.method('odd', base='none')\ndef odd(scope):\n    return scope.nothing\n"
    )
    with pytest.raises(InputError, match=r"^method 'odd' failed on tensor \S+: AttributeError"):
        plan(config_of("odd", paths), methods=methods)


def test_our_own_errors_keep_their_text_in_a_users_file(methods: Path, paths: list[Path]) -> None:
    methods.write_text("import streammerge\nstreammerge.plan({'merge_method': 'tise', 'models': []})\n")
    with pytest.raises(InputError) as caught:
        plan(config_of("odd", paths), methods=methods)
    assert "my_methods.py" not in str(caught.value)
    assert "Error" not in str(caught.value)


# --- what methods declare


@pytest.mark.parametrize(("method", "parameters"), VARIANTS)
def test_no_method_needs_more_than_it_declares(
    method: str, parameters: dict[str, Any], make_models: Callable[..., list[Path]]
) -> None:
    decided = plan(config_for(method, make_models(), parameters=parameters))
    declared = decided.method
    if any(declared.drops(job.parameters) for job in decided.jobs if job.kind == "merge"):
        return  # a drop before it is no part of it
    order = list(Extent)
    assert max(order.index(access) for access in decided.access) <= order.index(declared.access)


# --- words of the version before


def test_modules_of_the_version_before_are_found_with_a_warning() -> None:
    from streammerge.algebra.rules import Rule, WeightedSum
    from streammerge.statistics.kinds import AbsSum, Statistic

    with pytest.warns(DeprecationWarning, match=r"methods\.recipes\.WeightedSum is now .*rules\.WeightedSum"):
        from streammerge.methods.recipes import WeightedSum as OldSum
    with pytest.warns(DeprecationWarning, match=r"methods\.requests\.AbsSum is now"):
        from streammerge.methods.requests import AbsSum as OldAbsSum
    with pytest.warns(DeprecationWarning, match="Statistic"):
        from streammerge.methods.requests import Request
    with pytest.warns(DeprecationWarning, match="Rule"):
        from streammerge.methods.recipes import Recipe
    assert (OldSum, OldAbsSum, Request, Recipe) == (WeightedSum, AbsSum, Statistic, Rule)
    with pytest.raises(ImportError, match="Nothing"):
        from streammerge.methods.requests import Nothing  # noqa: F401


def test_a_base_called_donor_is_the_template_with_a_warning(methods: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"base=\"template\""):
        streammerge.method("of_a_donor", base="donor")(lambda models, base: models[0])
    assert registry.get_method("of_a_donor").base == "template"


# --- what the types say


def test_a_value_per_model_and_a_statistic_have_their_types() -> None:
    from streammerge.algebra.task_vectors import TaskVector
    from streammerge.statistics.asking import ask, ask_all
    from streammerge.statistics.kinds import AbsSum

    def steps() -> Any:
        total = yield from ask(AbsSum(TaskVector(0)))
        both = yield from ask_all([AbsSum(TaskVector(1)), AbsSum(TaskVector(2))])
        return total, both

    asked = steps()
    assert next(asked) == [AbsSum(TaskVector(0))]
    assert asked.send([1.5]) == [AbsSum(TaskVector(1)), AbsSum(TaskVector(2))]
    with pytest.raises(StopIteration) as stop:
        asked.send([2.0, 3.0])
    assert stop.value.value == (1.5, [2.0, 3.0])
    assert streammerge.per_model(1.0) == 1.0


def test_an_access_that_is_none_is_refused_when_it_is_registered(methods: Path) -> None:
    with pytest.raises(
        InputError, match=r"unknown access 'rows': give one of elementwise, row, tensor, model"
    ):
        streammerge.method("of_rows", access="rows")(lambda models, base: models[0])


# --- methods know where they are

PLACED = """
import streammerge
from streammerge.algebra.rules import CopyOf, WeightedSum

SEEN = []

@streammerge.method("placed", base="optional", access="{access}")
def placed(models, base, *, context):
    SEEN.append(context)
    mean = sum(models) / len(models)
    return models[0] + 0 if context.kind in ("embedding", "head", "norm") else mean * (1 + (context.depth or 0))

@streammerge.method("placed_rule", base="none")
def placed_rule(context):
    return CopyOf(1) if context.kind == "embedding" else WeightedSum((1.0,) * context.n_models, context.n_models)
"""
PLACES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (600, 64),
    "model.layers.0.self_attn.q_proj.weight": (96, 130),
    "model.layers.1.mlp.up_proj.weight": (96, 130),
    "model.layers.2.input_layernorm.weight": (64,),
    "scale": (),
}


@pytest.mark.parametrize("access", ["elementwise", "row", "tensor"])
def test_a_formula_knows_which_tensor_it_is_given_however_small_the_pieces(
    access: str,
    make_models: Callable[..., list[Path]],
    methods: Path,
    small_capacity: Callable[[int, int], None],
    tmp_path: Path,
) -> None:
    paths = make_models(shapes=PLACES, dtype=torch.float32)
    methods.write_text(PLACED.replace("{access}", access))
    small_capacity(1 << 23, 40)
    merge(config_for("placed", paths), tmp_path / "out", methods=methods)
    seen = {context.name: context for context in registry.get_method("placed").function.__globals__["SEEN"]}
    assert {name: context.shape for name, context in seen.items()} == PLACES
    assert [(c.kind, c.layer, c.n_layers, c.depth) for c in (seen[name] for name in PLACES)] == [
        ("embedding", None, None, None),
        ("attention", 0, 3, 0.0),
        ("mlp", 1, 3, 0.5),
        ("norm", 2, 3, 1.0),
        ("other", None, None, None),
    ]
    assert all(context.has_base and context.n_models == 3 for context in seen.values())
    merged, first = read_tensors(tmp_path / "out"), read_tensors(paths[1])
    assert torch.equal(merged["model.embed_tokens.weight"], first["model.embed_tokens.weight"])


def test_a_method_may_choose_its_rule_by_the_tensor(
    make_models: Callable[..., list[Path]], methods: Path, tmp_path: Path
) -> None:
    paths = make_models(shapes=PLACES, dtype=torch.float32)
    methods.write_text(PLACED.replace("{access}", "row"))
    merge(config_of("placed_rule", paths), tmp_path / "out", methods=methods)
    merged, *models = (read_tensors(path) for path in (tmp_path / "out", *paths[1:]))
    embedding, other = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(merged[embedding], models[1][embedding])
    torch.testing.assert_close(merged[other], sum(model[other] for model in models) / 3)


@pytest.mark.parametrize(
    ("workspace", "more"),
    [("100", 100 * 600 * 64), ("lambda context: 1000 * context.n_elements", 1000 * 600 * 64)],
)
def test_the_planner_counts_what_a_formula_declares(
    workspace: str, more: int, make_models: Callable[..., list[Path]], methods: Path
) -> None:
    paths = make_models(shapes=PLACES, dtype=torch.float32)
    found = []
    for declared in ("", f", workspace={workspace}"):
        methods.write_text(
            f"import streammerge\n@streammerge.method('big', access='tensor', base='none'{declared})\n"
            "def big(models, base):\n    return models[0]\n"
        )
        decided = plan(config_of("big", paths), methods=methods)
        found.append(
            next(w.workspace for j, w in zip(decided.jobs, decided.work, strict=True) if "embed" in j.name)
        )
    assert found[1] - found[0] == more


def test_a_workspace_that_is_no_number_of_bytes_is_one_line(paths: list[Path], methods: Path) -> None:
    methods.write_text(
        "import streammerge\n@streammerge.method('big', base='none', workspace=lambda context: 0.5)\n"
        "def big(models, base):\n    return models[0]\n"
    )
    with pytest.raises(
        InputError, match=r"method 'big': workspace\(context\) returned 0\.5 .* an int of 0 or more"
    ):
        plan(config_of("big", paths), methods=methods)
