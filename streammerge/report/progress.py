"""What a person sees while a merge runs: a bar on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from streammerge.engine.session import Event, Summary
from streammerge.engine.telling import Density
from streammerge.errors import printable
from streammerge.planning.free_memory import peak_memory
from streammerge.planning.plan import MergePlan
from streammerge.units import format_seconds, format_size

_LINE_SECONDS = 10.0


def resident_bytes() -> int:
    """Return the resident memory of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


class JsonReporter:
    """One JSON object per event on stdout."""

    def __call__(self, event: Event) -> None:
        """Print an event."""
        self._print({"event": event.kind, **event.values})

    def finish(self, summary: Summary) -> None:
        """Print the summary."""
        self._print({"event": "done", **summary_values(summary)})

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, values: dict[str, Any]) -> None:
        print(json.dumps(values, ensure_ascii=True), flush=True)


class LineReporter:
    """A line now and then on stderr, for logs."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._last = time.monotonic()
        self._rate = Rate()

    def __call__(self, event: Event) -> None:
        """Print warnings always, and progress every few seconds unless quiet."""
        if event.kind == "warning":
            print(f"warning: {event.values['message']}", file=sys.stderr, flush=True)
        elif self._quiet:
            return
        elif event.kind in ("start", "resume"):
            # The clock starts with the bytes: a first compile of the kernels may have gone before.
            self._last, self._rate = time.monotonic(), Rate()
            if event.kind == "start":
                return
            print(
                f"resuming: {format_size(event.values['bytes_done'])} of the output are done", file=sys.stderr
            )
        elif event.kind in ("progress", "import", "hash", "verify"):
            text = self._rate.text(event.values) if event.kind == "progress" else _read_text(event.values)
            if time.monotonic() - self._last >= _LINE_SECONDS:
                self._last = time.monotonic()
                print(text, file=sys.stderr, flush=True)

    def finish(self, summary: Summary) -> None:
        """Print the summary on stdout."""
        if not self._quiet:
            print(summary_text(summary))

    def close(self) -> None:
        """Nothing is open."""


class BarReporter:
    """A live bar on a terminal's stderr."""

    def __init__(self, what: str = "merging") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn(what), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"),
            console=self._console, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task(what, total=None, text="")
        self._rate = Rate()
        self._progress.start()

    def __call__(self, event: Event) -> None:
        """Move the bar; print warnings and the like above it."""
        if event.kind == "warning":
            self._console.print(f"warning: {event.values['message']}", markup=False, highlight=False)
        elif event.kind == "resume":
            self._console.print(f"resuming: {format_size(event.values['bytes_done'])} of the output are done")
        elif event.kind == "hash":
            self._progress.update(self._task, text=f"hashing the inputs, {_read_text(event.values)}")
        elif event.kind == "progress":
            values = event.values
            self._progress.update(
                self._task, completed=values["elements"], total=values["elements_total"],
                text=self._rate.text(values),
            )  # fmt: skip

    def finish(self, summary: Summary) -> None:
        """Remove the bar and print the summary on stdout."""
        self.close()
        print(summary_text(summary))

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()


class Rate:
    """Throughput and time left, from the elements done since this run began."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._first: int | None = None

    def text(self, values: Any) -> str:
        """Return one line on how far a merge is."""
        if self._first is None:
            self._first = values["elements"]
        seconds = max(1e-6, time.monotonic() - self._began)
        read, written = values["bytes_read"], values["bytes_written"]
        done = values["elements"] - self._first
        left = values["elements_total"] - values["elements"]
        remaining = format_seconds(left * seconds / done) if done else "?"
        return (
            f"{values['tensors']}/{values['tensors_total']} tensors, read {format_size(read)}, written {format_size(written)}, {(read + written) / seconds / 1e6:.0f} MB/s, "
            f"{remaining} left, resident {format_size(resident_bytes())}"
        )


def _read_text(values: Mapping[str, Any]) -> str:
    tensors = f"{values['tensors']}/{values['tensors_total']} tensors, " if "tensors" in values else ""
    return f"{tensors}read {format_size(values['bytes_read'])}"


def summary_values(summary: Summary) -> dict[str, Any]:
    """Return a summary as plain values."""
    return {
        "out": summary.out, "already_complete": summary.already_complete, "tensors": summary.tensors,
        "shards": summary.shards, "bytes_read": summary.bytes_read, "bytes_written": summary.bytes_written,
        "bytes_resumed": summary.bytes_resumed, "seconds": round(summary.seconds, 3),
        "peak_resident_bytes": peak_memory(), "densities": [density_values(density) for density in summary.densities],
        **({"floored": dict(summary.floored)} if summary.floored is not None else {}),
    }  # fmt: skip


def density_values(density: Density) -> dict[str, Any]:
    """Return a density as plain values; `model` is its place."""
    return {
        "model": density.place, "name": density.model, "kept": density.kept, "of": density.of,
        "density": density.density,
    }  # fmt: skip


def summary_text(summary: Summary) -> str:
    """Return a summary for people."""
    out = printable(summary.out)
    if summary.already_complete:
        return f"{out} already holds this merge, complete ({summary.tensors} tensors); nothing was done"
    rate = (summary.bytes_read + summary.bytes_written) / max(summary.seconds, 1e-6) / 1e6
    lines = [
        f"wrote {out}: {summary.tensors} tensors in {summary.shards} shard{'s' * (summary.shards != 1)}, "
        f"{format_size(summary.bytes_written + summary.bytes_resumed)}",
        f"read {format_size(summary.bytes_read)} in {format_seconds(summary.seconds)} ({rate:.0f} MB/s read and written), "
        f"peak memory {format_size(peak_memory())}",
    ]
    if summary.bytes_resumed:
        lines.append(f"{format_size(summary.bytes_resumed)} were finished by an earlier run")
    lines += [
        f"{printable(entry.model, 60)}: {entry.density:.4f} of its task vector survived ({entry.kept} of {entry.of})"
        for entry in summary.densities
    ]
    if summary.floored is not None:
        lines.append(
            f"the floor decided {100 * summary.floored['fraction']:.3g} % of {summary.floored['of']:,} elements"
        )
    return "\n".join(lines)


def plan_text(plan: MergePlan, values: dict[str, Any], free_disk: int) -> str:
    """Return a plan for people."""
    base = f", base {printable(values['base_model'])}" if values["base_model"] else ""
    kinds = ", ".join(f"{n} {kind}" for kind, n in values["tensors_by_kind"].items())
    passes = ""
    if values["model_passes"]:
        passes = (
            f", {values['model_passes']} whole-model pass{'es' * (values['model_passes'] != 1)} before it"
        )
    shards = values["shards"]
    size = f"{shards[0]['name']} … {shards[-1]['name']}" if len(shards) > 1 else shards[0]["name"]
    lines = [
        f"method    {values['method']} ({', '.join(values['access'])}){passes}",
        f"models    {len(values['models'])}: {', '.join(printable(m, 60) for m in values['models'])}{base}",
        f"tensors   {values['tensors']} ({kinds}), {', '.join(values['dtypes'])}, {values['elements']:,} parameters",
        f"read      {format_size(values['bytes_to_read'])}; streamed for their statistics: "
        f"{values['streamed_tensors']} tensors",
        f"write     {format_size(values['bytes_to_write'])} in {len(shards)} shard{'s' * (len(shards) != 1)}: {size}",
        f"memory    at most {format_size(values['memory'])}: {format_size(values['memory_reserve'])} for the process, lists of tensors and statistics, "
        f"the rest for buffers; {values['chunks']} chunks, the largest {format_size(values['largest_chunk_bytes'])}",
        f"disk      {format_size(free_disk)} free here",
    ]
    lines += [f"warning: {warning}" for warning in values["warnings"]]
    return "\n".join(lines)
