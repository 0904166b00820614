"""`warm-up`: compile all kernels in advance."""

from __future__ import annotations

import click

from streammerge.cli.options import GroupedCommand, examples


@click.command("warm-up", cls=GroupedCommand, epilog=examples("streammerge warm-up"))
def warm_up() -> None:
    """Compile all kernels in advance (half a minute), for a container image, say. A merge compiles only those it needs.

    They are cached in NUMBA_CACHE_DIR, XDG_CACHE_HOME or ~/.cache, for this version and kind of CPU.
    """
    from streammerge.backends.cpu.before_use import compile_groups
    from streammerge.backends.cpu.compile import GROUPS
    from streammerge.cli.process import stop_on_signals
    from streammerge.errors import WorldError
    from streammerge.events import Control
    from streammerge.numerics.compiled import kernel_cache
    from streammerge.report.progress import LineReporter

    control = Control(LineReporter(), *stop_on_signals())
    if kernel_cache().directory is None:
        from streammerge.numerics.compiled import NOWHERE

        raise WorldError(f"the kernels: {NOWHERE.format('; '.join(kernel_cache().refused))}")
    _, failure = compile_groups(GROUPS, control)
    if failure is not None:
        raise WorldError(f"the kernels: {failure}")
    click.echo(f"all kernels are compiled, in {kernel_cache().directory}")
