"""The commands that show a model's tensors, the methods, an example config, the schema, or the demo."""

from __future__ import annotations

import json
from pathlib import Path

import click

from streammerge.cli.options import (
    MESSAGES,
    GroupedCommand,
    complete_methods,
    examples,
    insecure_option,
    methods_option,
    option,
    path,
)


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge inspect models/llama-base              totals, and the first tensors",
        "streammerge inspect models/llama-base 'q_proj'     tensors whose name matches",
        "streammerge inspect models/llama-base --all        all tensors",
        "streammerge inspect s3://bucket/llama-base         a model in an object store",
    ),
)
@click.argument("model", type=path())
@click.argument("pattern", required=False)
@option("--all", "everything", is_flag=True, help="List every tensor, not only the first.")
@option("--json", "as_json", is_flag=True, group=MESSAGES, help="Print every tensor as JSON.")
@insecure_option
def inspect(model: str, pattern: str | None, everything: bool, as_json: bool) -> None:
    """Show a model's totals and its tensors: dtype, shape, bytes, file.

    PATTERN is a regular expression; only tensors whose names it matches are listed.
    """
    from streammerge.api.looking import inspect_model
    from streammerge.report.tables import inspect_text, inspect_values, name_filter

    wanted = name_filter(pattern)
    index = inspect_model(model)
    if as_json:
        tensors = [tensor for tensor in inspect_values(index) if wanted(tensor["name"])]
        click.echo(json.dumps({"model": model, "nbytes": index.nbytes, "tensors": tensors}))
    else:
        click.echo(inspect_text(index, wanted if pattern is not None else None, everything=everything))


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge methods          all methods, a line each",
        "streammerge methods ties     formula, parameters, paper, an example",
    ),
)
@click.argument("name", required=False, shell_complete=complete_methods)
@methods_option
def methods(name: str | None, methods: str | None) -> None:
    """List the merge methods, or show one: formula, parameters, defaults, paper, an example."""
    from streammerge.api.looking import list_methods
    from streammerge.methods.registry import get_method
    from streammerge.report.tables import method_text, methods_text
    from streammerge.report.wrapping import wrapped

    known = list_methods(methods)
    if name is None:
        click.echo(methods_text(known))
    else:
        click.echo(wrapped(method_text(get_method(name, "methods"))))


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge new ties > ties.yml",
        "streammerge new slerp",
    ),
)
@click.argument("method", shell_complete=complete_methods)
@methods_option
def new(method: str, methods: str | None) -> None:
    """Print a commented config for METHOD, to be edited."""
    from streammerge.api.looking import list_methods
    from streammerge.methods.registry import get_method
    from streammerge.report.example import commented_config

    list_methods(methods)  # registers them
    click.echo(commented_config(get_method(method, "new")), nl=False)


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        "streammerge schema > streammerge.schema.json",
        "# and as the first line of a config, for editors with a YAML language server:",
        "# yaml-language-server: $schema=streammerge.schema.json",
    ),
)
@methods_option
def schema(methods: str | None) -> None:
    """Print the JSON schema of the config, with which editors complete keys and mark misspelt ones."""
    from streammerge.methods.catalog import load_builtin, load_file
    from streammerge.methods.registry import all_methods
    from streammerge.report.config_schema import config_schema

    load_builtin()
    if methods is not None:
        load_file(Path(methods))
    click.echo(json.dumps(config_schema(all_methods()), indent=2))


@click.command(cls=GroupedCommand, epilog=examples("streammerge demo", "streammerge demo merges"))
@click.argument("out", type=path(file_okay=False), required=False)
def demo(out: str | None) -> None:
    """Merge the small real models that ship with the package and print the accuracy of each merge.

    The outputs go to OUT if it is given, else to a temporary directory.
    """
    from streammerge.demo.show import run_demo

    run_demo(None if out is None else Path(out))


@click.command(
    cls=GroupedCommand,
    epilog=examples(
        'eval "$(streammerge completion bash)"                     for this shell; or put it in ~/.bashrc',
        'eval "$(streammerge completion zsh)"                      the same in ~/.zshrc',
        "streammerge completion fish > ~/.config/fish/completions/streammerge.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that makes SHELL complete commands, options, files and method names."""
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(ctx.find_root().command, {}, "streammerge", "_STREAMMERGE_COMPLETE").source())
