"""Targets that read a merge's own records: journals and manifests."""

from __future__ import annotations

import json
import re
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzz_files import same_json
from fuzz_promises import MAX_LINE, refused, require

from streammerge.errors import ModelError
from streammerge.output.check import verify
from streammerge.output.edits import find_edits
from streammerge.output.journal import _load, line_of
from streammerge.output.manifest import read_manifest, seal
from streammerge.output.place import MANIFEST

# --- what a merge leaves for the next


def _natural(value: object) -> bool:
    return type(value) is int and value >= 0


class JournalFile:
    """No journal stops the program: its sound beginning is believed, and everything in that has its type."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "journal.jsonl"

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        self._path.write_bytes(raw)
        progress, sound = _load(self._path)
        require(raw.startswith(sound), "sound lines that are not its beginning")
        if progress is None:
            require(not sound, "sound lines without progress")
            return
        names = [*progress.identity.keys(), *progress.identity.values()]
        require(all(isinstance(name, str) for name in names), "an identity that is no map of strings")
        for receipt in progress.receipts:
            numbers = (
                receipt.job,
                receipt.start,
                receipt.stop,
                *receipt.crcs,
                receipt.floored,
                receipt.not_finite,
                *receipt.kept,
            )
            require(all(_natural(n) for n in numbers), f"{receipt}")
            require(receipt.start <= receipt.stop and max(receipt.crcs, default=0) < 1 << 32, f"{receipt}")
        known = [text for file in progress.files.values() for text in (file.stamp, file.content)]
        require(all(isinstance(text, str) for text in (*progress.files, *known)), "files that are no texts")
        self._check_answers(progress.answers)
        self._path.write_bytes(sound)
        require(_load(self._path) == (progress, sound), "its sound part alone says something else")

    @staticmethod
    def _check_answers(answers: dict) -> None:
        from streammerge.statistics import companions, counts, random_words, ranks, sums, ties

        kinds = (
            *(sums.AbsSum, sums.Squares, companions.FisherSquares, counts.NonZero, counts.Touches),
            *(counts.SignTotal, ranks.TopK, ties.TieIndex, random_words.LowWords),
        )
        statistics: list[Any] = [kind.__new__(kind) for kind in kinds]
        for job, rounds in answers.items():
            require(isinstance(job, str) and job.isascii() and job.isdigit(), f"answers of job {job!r}")
            for one in rounds:
                for answer in one:
                    for statistic in statistics:
                        with suppress(ValueError):
                            value = statistic.from_json(answer)
                            again = statistic.from_json(statistic.to_json(value))
                            require(repr(again) == repr(value), f"the answer {answer!r}")

    @staticmethod
    def seeds() -> list[bytes]:
        """Return journals as merges write them."""
        files = {
            "of base/model.safetensors": ["ab" * 16, "cd" * 32],
            "beside base/config.json": ["ef" * 16, ""],
        }
        identity = {"version": "1", "config": "ab" * 16, "input base": "cd" * 16}
        first = line_of({"identity": identity, "files": files})
        done = [
            line_of({"done": [i, 4096 * i, 4096 * (i + 1), zlib.crc32(bytes([i])), 0, 0, 7, 9]})
            for i in range(5)
        ]
        plain = [
            {"threshold": [12345, 3, 2]},
            {"squares": [(0.5).hex(), 100]},
            {"float": (1.5).hex()},
            {"pair": [1, 2]},
            {"sums": [[(0.25).hex(), (3.0).hex()], 100]},
            {"touched": [[1, 0], [2, 2]]},
            7,
        ]
        answer = line_of({"answer": ["3", [plain, [plain[0]]]]})
        whole = first + b"".join(done) + answer
        again = line_of({"files": {"of base/model.safetensors": ["00" * 16, "cd" * 32]}})
        return [
            first,
            first + again + done[0],
            whole,
            whole[:-5],
            whole + b"\0" * 64,
            done[0] + first,
            first + first,
            b"",
            first + line_of({"done": [-1, 0, 1, 0, 0, 0]}),
            first + line_of({"other": 1}) + done[0],
        ]


class Manifest:
    """No manifest stops the program or `verify`; one that is believed has the fields that are used."""

    def __init__(self, directory: Path) -> None:
        self._out = directory / "out"
        self._out.mkdir(exist_ok=True)
        (self._out / "a").write_bytes(b"abc")

    def __call__(self, raw: bytes) -> None:
        """Check one input."""
        (self._out / MANIFEST).write_bytes(raw)
        manifest = read_manifest(self._out)
        if manifest is not None:
            find_edits(self._out, manifest["files"])
            require(same_json(manifest, json.loads(raw)), "read otherwise than json reads it")
            for entry in manifest["files"].values():
                require(_natural(entry["nbytes"]) and re.fullmatch("[0-9a-f]{8}", entry["crc32"]), f"{entry}")
        try:
            verdict = verify(self._out)
        except Exception as error:
            require(MANIFEST in refused(error, ModelError), "the manifest is not named")
            require(manifest is None, "a manifest that is believed is refused")
            return
        require(manifest is not None, "a manifest that is not believed is verified")
        for problem in verdict.problems:
            require(
                problem.isprintable() and len(problem) <= MAX_LINE, f"a problem of {len(problem)} characters"
            )

    @staticmethod
    def seeds() -> list[bytes]:
        """Return manifests as merges write them."""
        files = {"a": {"nbytes": 3, "crc32": "352441c2"}, "b": {"nbytes": 1, "crc32": "00000000"}}
        tensor = {"dtype": "BF16", "shape": [2, 3], "crc32": "00000000"}
        whole = {
            "format": 2,
            "streammerge": "1",
            "method": "ties",
            "seed": 0,
            "identity": {"config": "ab"},
            "inputs": [{"role": "base", "fingerprint": "x", "tensors": 1, "nbytes": 2}],
            "densities": [],
            "floored": {"elements": 1, "of": 2, "fraction": 0.5},
            "not_finite": {"w": 1},
            "files": files,
            "tensors": {"w": tensor},
        }
        sealed = [
            seal(whole),
            seal({**whole, "files": {"a": files["a"]}}),
            seal({"files": []}),
            seal({"a": 1}),
        ]
        return [*sealed, sealed[0][:-9], b"", b"{}", sealed[0].replace(b"ties", b"diet")]
