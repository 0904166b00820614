"""Cut the power during merges of a scene, run them again, and see that nothing was torn and nothing is lost."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import OutputError, WorldError
from tests.laws.resume.file_log import Recorder, Tree
from tests.laws.resume.power_loss import Blackout, blackouts, build, digest, lay_out, tree_of
from tests.laws.resume.scene import Scene, SimulatedKill

OUT = Path("above") / "out"


class Trials:
    """Power losses in one scene.

    Parameters
    ----------
    limit
        Most power losses tried of one log, drawn by `chance` from all; None: all of them.
    n_random
        Random ones at every cut, beside the systematic ones.
    out
        The output, on a disk.
    """

    def __init__(
        self, scene: Scene, chance: random.Random, *, limit: int | None, n_random: int, out: Path = OUT
    ) -> None:
        self.scene, self.chance, self.limit, self.n_random = scene, chance, limit, n_random
        self.out = out
        self.counts: Counter[str] = Counter()
        self._tried: set[bytes] = set()

    def disk(self, name: str, tree: Tree | None = None) -> Recorder:
        """Return a recorder over a directory that holds `tree`, durable."""
        root = self.scene.directory / name
        lay_out(tree or {}, root)
        return Recorder(root, pause=0.002)

    def run(self, disk: Recorder, *, kill_at: int | None = None, **options: Any) -> bool:
        """Merge on a recorded disk; return whether the merge ended well."""
        disk.kill_at = kill_at
        self.counts["merges recorded"] += 1
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("streammerge.engine.scheduler._SYNC_SECONDS", 0.004)
                disk.patch(patch)
                self.scene.merge(disk.root / self.out, **options)
        except SimulatedKill:
            assert kill_at is not None
            return False
        except WorldError:
            assert disk.fail_sync is not None
            return False
        finally:
            assert build(disk.log, set(), {}) == tree_of(disk.root), "the recorder missed something"
        return True

    def killed_at_random(self, disk: Recorder, n_ops: int) -> int:
        """Merge, killed at some operation; return where the log of the next run begins."""
        begin = len(disk.log)
        self.run(disk, kill_at=begin + self.chance.randrange(n_ops))
        return len(disk.log)

    def losses(self, disk: Recorder, begin: int, end: int | None = None) -> list[Blackout]:
        """Return the power losses to try at or after a place of the log."""
        found = blackouts(disk.log[:end], begin, self.chance, self.n_random, self.limit)
        self.counts["operations"] += len(disk.log[:end]) - begin
        self.counts["different states"] += len(found)
        return found

    def try_all(self, disk: Recorder, begin: int) -> None:
        """Cut the power at or after a place of the log of a merge that ended well."""
        for loss in self.losses(disk, begin):
            tree = loss.tree(disk.log)
            try:
                self.try_one(tree, ended=loss.cut == len(disk.log))
            except BaseException as error:
                error.add_note(describe(loss, disk))
                raise

    def try_one(self, tree: Tree, *, ended: bool) -> None:
        """See that a state has nothing torn and that the merge, run again, gives what it always gives.

        After a merge that `ended`, nothing is left to do.
        """
        key = digest(tree) + bytes([ended])
        if key in self._tried:
            return
        self._tried.add(key)
        self.counts["states tried"] += 1
        root = self.scene.directory / "after"
        lay_out(tree, root)
        self.scene.assert_nothing_torn(root / self.out)
        if not ended:
            self.scene.merge(root / self.out)
        self.scene.assert_finished(root / self.out)

    def replacing(self, old: Scene, *, finished: bool) -> Recorder:
        """Merge with --overwrite over another scene's merge, beside a file of the user's; return the disk."""
        before = Trials(old, self.chance, limit=None, n_random=0)
        disk = before.disk("disk")
        assert before.run(disk)
        n_ops = len(disk.log) - disk.begin
        if not finished:
            disk = before.disk("disk")
            before.run(disk, kill_at=disk.begin + n_ops * 2 // 3)
        disk = self.disk("replaced", tree_of(disk.root) | {str(OUT / "notes.txt"): b"mine"})
        assert self.run(disk, overwrite=True)
        return disk

    def try_replaced(self, disk: Recorder, old: Scene, end: int | None = None) -> None:
        """Cut the power while a merge replaces that of another scene, up to the end of the log or before."""
        for loss in self.losses(disk, disk.begin, end):
            tree = loss.tree(disk.log)
            out = self.scene.directory / "after" / OUT
            try:
                for options in ({"overwrite": True}, {}):
                    self.counts["states tried"] += 1
                    lay_out(tree, self.scene.directory / "after")
                    assert_old_or_new(out, old, self.scene)
                    try:
                        self.scene.merge(out, **options)
                    except OutputError:
                        assert not options
                        self.counts["refused without --overwrite"] += 1
                        assert tree_of(self.scene.directory / "after") == tree
                        continue
                    assert (out / "notes.txt").read_bytes() == b"mine"
                    (out / "notes.txt").unlink()
                    self.scene.assert_finished(out)
            except BaseException as error:
                error.add_note(describe(loss, disk))
                raise


def assert_old_or_new(out: Path, old: Scene, new: Scene) -> None:
    """See that what loads is a whole model, the old one or the new one, and that no final name lies."""
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert files.pop("notes.txt") == b"mine"
    final = {name: data for name, data in files.items() if not name.endswith(".partial")}
    for name, data in final.items():
        assert data in (old.expected.get(name), new.expected.get(name)), name
    if "model.safetensors.index.json" in final or "model.safetensors" in final:
        assert final in (old.expected, new.expected)


def describe(loss: Blackout, disk: Recorder) -> str:
    """Return a power loss in words, for whoever looks for the reason."""
    log = disk.log

    def show(place: int) -> str:
        text = repr(log[place])
        return f"  {place}: {text if len(text) < 160 else text[:100] + ' ...'}"

    lines = [
        f"power lost after {loss.cut} of {len(log)} operations (recorded from {disk.begin})",
        "the last ones:",
    ]
    lines += [show(place) for place in range(max(0, loss.cut - 12), loss.cut)]
    lines += ["not on the disk:", *map(show, sorted(loss.dropped)), "in part:", *map(show, sorted(loss.torn))]
    return "\n".join(lines)
