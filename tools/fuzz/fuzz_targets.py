"""The fuzzer's targets: readers of files from strangers, with the inputs they start from."""

from __future__ import annotations

from pathlib import Path

import fuzz_json
import fuzz_mutate
from fuzz_configs import (
    change_yaml,
    check_config,
    check_size,
    check_yaml,
    config_seeds,
    size_seeds,
    yaml_seeds,
)
from fuzz_files import NAMES, Header, Model, Pickles, Reference, change_json, check_json, json_seeds
from fuzz_models import AdapterSettings, TokenizerFile
from fuzz_outputs import JournalFile, Manifest
from fuzz_promises import Target, refused, require, table_of
from fuzz_quantised import Declarations
from fuzz_stores import STORE_WORDS, FisherTable, check_chunk, chunk_seeds


def make_targets(directory: Path) -> dict[str, Target]:
    """Return all targets by name; their inputs are written below `directory`."""
    model, journal, manifest, table = (
        Model(directory),
        JournalFile(directory),
        Manifest(directory),
        FisherTable(directory),
    )
    reference, pickles = Reference(directory), Pickles(directory)
    tokenizer = TokenizerFile(directory, require, refused)
    adapter = AdapterSettings(directory, require, refused, table_of("formats.safetensors_files", "sound"))
    builders = [table_of("checkpoint.quantized.formats", name) for name in ("stored", "write_entries")]
    declarations = Declarations(directory, require, refused, *builders)
    targets = [
        Target("header", "safetensors headers", Header.seeds, Header(directory), fuzz_mutate.header),
        Target("json", "strict JSON", json_seeds, check_json, change_json),
        Target(
            "model",
            "the index of a sharded model",
            Model.seeds,
            model,
            lambda raw, rng, blind: fuzz_json.json_text(raw, rng, blind, [*fuzz_json.TEXTS, *NAMES]),
        ),
        Target("reference", "names in the hub cache", Reference.seeds, reference),
        Target("pickles", "PyTorch checkpoints", Pickles.seeds, pickles, fuzz_mutate.pickled),
        Target("yaml", "strict YAML", yaml_seeds, check_yaml, change_yaml),
        Target("config", "merge configs", config_seeds, check_config, change_yaml),
        Target("journal", "journals of unfinished merges", JournalFile.seeds, journal, fuzz_mutate.journal),
        Target("manifest", "manifests of finished merges", Manifest.seeds, manifest, fuzz_mutate.manifest),
        Target(
            "fisher",
            "tables of Fisher stores",
            FisherTable.seeds,
            table,
            lambda raw, rng, blind: fuzz_json.json_text(raw, rng, blind, STORE_WORDS),
        ),
        Target("chunk", "compressed chunks of Fisher stores", chunk_seeds, check_chunk),
        Target(
            "tokenizer", "vocabularies of tokenizers", TokenizerFile.seeds, tokenizer, TokenizerFile.change
        ),
        Target(
            "adapter", "settings of LoRA adapters", AdapterSettings.seeds, adapter, AdapterSettings.change
        ),
        Target(
            "quantised",
            "declarations of quantised models",
            lambda: Declarations.seeds_of(table_of("checkpoint.quantized.formats", "FORMATS")),
            declarations,
            Declarations.change,
        ),
        Target("size", "sizes of memory and shards", size_seeds, check_size),
    ]
    return {target.name: target for target in targets}
