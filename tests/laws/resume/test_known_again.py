"""Input files that were touched or copied are known again by their content, where that was hashed; others are not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streammerge import verify
from streammerge.errors import InputError, OutputError, Stopped, WorldError
from streammerge.estimate.fisher.importing import import_diagonal
from streammerge.events import Event
from streammerge.formats.safetensors import read_header
from streammerge.output.inputs import ContentHasher
from streammerge.output.journal import line_of
from streammerge.output.manifest import load_manifest
from streammerge.output.place import JOURNAL as NAME
from streammerge.output.place import STATE
from streammerge.planning.memory.budget import SMALLEST_CAPACITY
from tests.conftest import output_bytes, use_capacity, write_fisher
from tests.laws.resume.scene import Scene, flip, make_scene
from tests.laws.resume.traps import interrupt

REFUSED = (
    r"with a different version of the files of .*: model\.safetensors has a different date, inode or size"
)
Change = Callable[[Path], None]


def weights(scene: Scene, which: int) -> Path:
    return scene.paths[which] / "model.safetensors"


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def copy(path: Path) -> None:
    """Replace a directory by a copy of it: new inodes, new dates."""
    shutil.copytree(path.parent, path.parent.with_name("copied"))
    shutil.rmtree(path.parent)
    path.parent.with_name("copied").rename(path.parent)


def flip_unseen(path: Path) -> None:
    """Change a bit where the fingerprint does not look, and put the date back."""
    before = path.stat()
    flip(path, read_header(path)[0]["embed.weight"].offset)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scene:
    """A merge into several shards; what is read does not depend on the method."""
    return make_scene("ties", tmp_path, monkeypatch)


@pytest.fixture
def hashed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scene hashes its inputs; the names of the files that were hashed are noted."""
    names: list[str] = []
    real = ContentHasher.hash

    def hash_and_note(self: ContentHasher, files: Any) -> dict[str, str]:
        names.extend(file.key for file in files if not file.group.startswith("beside"))
        return real(self, files)

    monkeypatch.setattr(ContentHasher, "hash", hash_and_note)
    scene.options = {**scene.options, "hash_inputs": True}
    scene.merge(scene.directory / "expected", overwrite=True)
    scene.expected = output_bytes(scene.directory / "expected")
    names.clear()
    return names


@pytest.mark.parametrize("change", [touch, copy])
@pytest.mark.parametrize("asked_again", [True, False])
def test_a_file_that_was_touched_or_copied_is_known_by_its_content_and_nothing_is_done_twice(
    asked_again: bool, change: Change, scene: Scene, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch, after=6)
    hashed.clear()
    change(weights(scene, 1))
    summary = scene.merge(out, hash_inputs=asked_again)
    assert summary.bytes_resumed > 0
    assert hashed == [f"of {scene.paths[1]}/model.safetensors"]
    scene.assert_finished(out)


def test_what_was_known_again_is_not_hashed_a_third_time(
    scene: Scene, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch, after=4)
    touch(weights(scene, 1))
    interrupt(scene, out, monkeypatch, after=2)
    hashed.clear()
    scene.merge(out)
    assert hashed == []
    scene.assert_finished(out)


def test_a_file_whose_content_changed_is_refused_by_name_whatever_its_date(
    scene: Scene, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    flip_unseen(weights(scene, 1))
    with pytest.raises(
        OutputError, match=r"of the files of .*m1: model\.safetensors has a different content.*--overwrite"
    ):
        scene.merge(out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    flip_unseen(weights(scene, 1))
    scene.merge(out)
    scene.assert_finished(out)


@pytest.mark.parametrize("change", [touch, copy])
def test_without_a_content_hash_a_touched_file_is_refused_by_name(
    change: Change, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    change(weights(scene, 1))
    with pytest.raises(OutputError, match=REFUSED):
        scene.merge(out)
    with pytest.raises(OutputError, match=REFUSED):
        scene.merge(out, hash_inputs=True)  # too late to know what it was


def test_hashing_may_begin_with_the_second_run(
    scene: Scene, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    scene.options["hash_inputs"] = False
    interrupt(scene, out, monkeypatch, after=2)
    scene.options["hash_inputs"] = True
    interrupt(scene, out, monkeypatch, after=2)
    touch(weights(scene, 2))
    scene.merge(out)
    scene.assert_finished(out)


def test_the_manifest_records_what_sha256sum_prints(scene: Scene, hashed: list[str]) -> None:
    entries = load_manifest(scene.directory / "expected")["inputs"]
    for path, entry in zip([*scene.paths[1:], scene.paths[0]], entries, strict=True):
        expected = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
        assert entry["sha256"] == {"model.safetensors": expected}


def test_hashing_changes_nothing_but_the_manifest(scene: Scene) -> None:
    scene.merge(scene.directory / "out", hash_inputs=True)
    found = output_bytes(scene.directory / "out")
    assert {name for name in found if found[name] != scene.expected[name]} == {"streammerge.json"}
    assert "sha256" not in scene.expected["streammerge.json"].decode()


# --- small files beside the weights


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_small_file_beside_the_weights_is_always_known_by_its_content(
    name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    path = scene.paths[0] / name
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert scene.merge(out).bytes_resumed > 0
    scene.assert_finished(out)


@pytest.mark.parametrize("moment", ["start", "progress", "commit"])
def test_a_small_file_touched_during_the_merge_is_no_change(moment: str, scene: Scene) -> None:
    out = scene.directory / "out"

    def on_event(event: Event) -> None:
        if event.kind == moment:
            touch(scene.paths[0] / "tokenizer.json")

    scene.merge(out, on_event=on_event)
    scene.assert_finished(out)


# --- during the merge


def at_first_progress(change: Callable[[], None]) -> Callable[[Event], None]:
    done: list[bool] = []

    def on_event(event: Event) -> None:
        if event.kind == "progress" and not done:
            done.append(True)
            change()

    return on_event


def test_a_file_touched_during_the_merge_is_known_by_its_content(scene: Scene, hashed: list[str]) -> None:
    scene.merge(scene.directory / "out", on_event=at_first_progress(lambda: touch(weights(scene, 1))))
    scene.assert_finished(scene.directory / "out")


def test_a_file_that_changes_during_the_merge_is_no_success_whatever_is_hashed(
    scene: Scene, hashed: list[str]
) -> None:
    with pytest.raises(WorldError, match=r"m1.*changed during the merge"):
        scene.merge(
            scene.directory / "out", on_event=at_first_progress(lambda: flip_unseen(weights(scene, 1)))
        )
    scene.assert_nothing_torn(scene.directory / "out")


# --- finished merges


def test_a_finished_merge_is_compared_by_content_where_that_is_asked_for(
    scene: Scene, hashed: list[str]
) -> None:
    out = scene.directory / "expected"
    assert scene.merge(out).already_complete
    flip_unseen(weights(scene, 1))
    assert scene.merge(out, hash_inputs=False).already_complete
    with pytest.raises(
        OutputError,
        match=r"finished merge, but the content of .*m1/model\.safetensors has changed.*--overwrite",
    ):
        scene.merge(out)


def test_a_finished_merge_without_hashes_says_that_it_cannot_tell(scene: Scene) -> None:
    events: list[Event] = []
    assert scene.merge(
        scene.directory / "expected", hash_inputs=True, on_event=events.append
    ).already_complete
    (warning,) = [event.values["message"] for event in events if event.kind == "warning"]
    assert "was finished without --hash-inputs" in warning


def test_verify_against_all_compares_the_content_hashes_first(
    scene: Scene, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_capacity(monkeypatch, 1 << 28, 2)
    assert verify(scene.directory / "expected", against=scene.config, sample=None).problems == ()
    flip_unseen(weights(scene, 1))
    with pytest.raises(InputError, match=r"the content of .*m1/model\.safetensors has changed"):
        verify(scene.directory / "expected", against=scene.config, sample=None)


# --- hashing itself


def test_a_signal_while_inputs_are_hashed_stops_it_and_nothing_is_begun(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, stop = scene.directory / "out", threading.Event()
    real = os.pread

    def pread(descriptor: int, nbytes: int, offset: int) -> bytes:
        stop.set()
        return real(descriptor, nbytes, offset)

    with monkeypatch.context() as patch:
        patch.setattr("streammerge.output.inputs.os.pread", pread)
        with pytest.raises(Stopped) as caught:
            scene.merge(
                out, hash_inputs=True, stop=stop, signal_received=lambda: 2 if stop.is_set() else None
            )
    assert caught.value.exit_code == 130
    assert list(out.iterdir()) == []
    scene.merge(out)
    scene.assert_finished(out)


def test_the_journal_of_a_merge_whose_files_have_wrong_types_is_not_believed(
    scene: Scene, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    path = out / STATE / NAME
    first, *rest = path.read_bytes().splitlines(keepends=True)
    record = json.loads(first[9:])
    for files in ([], {"a": "b"}, {"a": ["b"]}, {"a": [1, 2]}, {"a": ["b", "c", "d"]}, None):
        path.write_bytes(line_of({**record, "files": files}) + b"".join(rest))
        assert scene.merge(out).bytes_resumed == 0
        scene.assert_finished(out)
        shutil.rmtree(out)
        interrupt(scene, out, monkeypatch)


# --- stores of Fisher diagonals


@dataclass(frozen=True)
class Stored:
    """A Fisher merge of which one diagonal is a store."""

    scene: Scene
    store: Path

    @property
    def out(self) -> Path:
        return self.scene.directory / "out"

    def replace_chunk(self) -> None:
        """Put a copy of a chunk in its place, of the same size, date and content."""
        chunk = next(path for path in sorted(self.store.rglob("c/**/*")) if path.is_file())
        shutil.copy2(chunk, chunk.with_name("other"))
        chunk.with_name("other").rename(chunk)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stored:
    scene = make_scene("fisher", tmp_path, monkeypatch)
    store = tmp_path / "m1.zarr"
    use_capacity(monkeypatch, SMALLEST_CAPACITY, 1)
    import_diagonal(str(scene.paths[1]), str(write_fisher(scene.paths[1])), store)
    use_capacity(monkeypatch, 1 << 18, 1)
    scene.config["models"][0]["fisher"] = str(store)
    return Stored(scene, store)


def test_a_chunk_of_a_store_that_was_replaced_is_refused_by_the_stores_name(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(stored.scene, stored.out, monkeypatch)
    stored.replace_chunk()
    with pytest.raises(OutputError, match=r"version of the files of .*m1\.zarr: chunks has a different date"):
        stored.scene.merge(stored.out)


def test_a_chunk_of_a_store_that_is_replaced_during_the_merge_is_no_success(stored: Stored) -> None:
    with pytest.raises(WorldError, match=r"m1\.zarr: the store changed"):
        stored.scene.merge(stored.out, on_event=at_first_progress(stored.replace_chunk))


def test_a_store_is_known_again_by_its_content(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.scene.options["hash_inputs"] = True
    interrupt(stored.scene, stored.out, monkeypatch)
    stored.replace_chunk()
    assert stored.scene.merge(stored.out).bytes_resumed > 0
    first, second = load_manifest(stored.out)["fisher_sha256"]
    assert set(first) == {"zarr.json", "chunks"}
    assert set(second) == {"m2-fisher.safetensors"}
