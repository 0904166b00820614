"""Decide by name which files of a model's folder are copied to an output.

All files are copied except weights, traces of a training, and pictures. Exclusion is more stable than inclusion: new
names of files that a tokenizer or a processor needs appear every month, but hardly any of files that it does not need.
"""

from __future__ import annotations

import re

from streammerge.formats.registry import suffixes
from streammerge.io.durable import PARTIAL
from streammerge.lazy import late_pattern

_WEIGHTS = late_pattern(
    r".*\.(?:safetensors|bin|pt|pth|ckpt|h5|hdf5|keras|msgpack|gguf|ggml|ggla|onnx|onnx_data|ot|tflite|pb|mlmodel|nemo"
    r"|engine|plan|pkl|pickle|joblib|distcp|llamafile|mar|npz|zip|tar|gz|tgz|bz2|xz|zst|7z|whl|parquet|arrow|exe|so|dll)"
    r"|.*\.onnx[._]data.*|.*\.(?:safetensors|bin|h5|msgpack)\.index(?:\..*)?\.json|openvino.*\.xml",
    re.ASCII | re.DOTALL | re.IGNORECASE,
)
_TRACES = late_pattern(
    r"optimizer.*|rng_state.*|trainer_.*|training_.*|(?:all|eval|train|test|predict)_results\.json|.*tfevents.*|.*\.log"
    r"|latest|zero_to_fp32\.py|mergekit_(?:moe_)?config\.yml|adapter_config\.json",
    re.ASCII | re.DOTALL | re.IGNORECASE,
)
_TRACE_FOLDERS = late_pattern(
    r"checkpoint-\d+|global_step\d+|runs|wandb|logs?|tensorboard|__pycache__|onnx|openvino|coreml|gguf|original",
    re.ASCII | re.IGNORECASE,
)
_PICTURES = late_pattern(
    r".*\.(?:png|jpe?g|gif|webp|svg|mp4|webm|mov|pdf|ipynb)", re.ASCII | re.DOTALL | re.IGNORECASE
)
_TOKENIZER = late_pattern(
    r"(?:.*tokenizer.*|tokenization_.*\.py|added_tokens.*|special_tokens_map.*|vocab.*|.*[._-]vocab(?:\..*)?|merges.*"
    r"|.*\.(?:model|spm|tiktoken|vocab|codes|bpe)|tekken.*|spiece.*|sentencepiece.*|normalizer\.json|encoder\.json"
    r"|dict(?:\..*)?\.txt|chat_template.*|additional_chat_templates/.*)",
    re.ASCII | re.DOTALL,
)
_SETTINGS = late_pattern(
    r".*config.*\.json|modules\.json|params\.json|model_index\.json", re.ASCII | re.DOTALL
)
_EDITABLE = late_pattern(
    r"README.*|LICEN[SC]E.*|NOTICE.*|COPYING.*|[^/]*\.md|SYSTEM_PROMPT.*|generation_config\.json|tokenizer_config\.json"
    r"|chat_template\.(?:jinja|json)|additional_chat_templates/.*",
    re.ASCII | re.DOTALL,
)
QUANTISATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Names of files that declare how weights are quantised."""
_OURS = ("streammerge.json", "streammerge_config.yml")
_LONGEST = 255


def is_weights(name: str) -> bool:
    """Return whether the name is that of weights, an archive or a program.

    >>> is_weights("model.Q4_K_M.gguf"), is_weights("tokenizer.model")
    (True, False)
    """
    return _WEIGHTS.fullmatch(name) is not None


def is_left_behind(name: str) -> bool:
    """Return whether the name is that of a file that no loader of the output needs."""
    kinds = (_WEIGHTS, _TRACES, _PICTURES)
    return name.endswith(suffixes()) or any(kind.fullmatch(name) is not None for kind in kinds)


def is_left_folder(name: str) -> bool:
    """Return whether the name is that of a folder with traces of a training or a different format of the model."""
    return _TRACE_FOLDERS.fullmatch(name) is not None


def is_replaced(name: str) -> bool:
    """Return whether the output gets its own version of a file, or the file is not part of the model's data."""
    return name.startswith((".", "README")) or name in _OURS or name.endswith(PARTIAL)


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file belongs to the tokenizer, by its path in the folder.

    >>> [is_tokenizer_file(name) for name in ("spm.model", "tekken.json", "generation_config.json")]
    [True, True, False]
    """
    return _TOKENIZER.fullmatch(name) is not None


def is_loaded(name: str) -> bool:
    """Return whether a loader reads files of this name."""
    return is_tokenizer_file(name) or _SETTINGS.fullmatch(name) is not None


def is_editable(name: str) -> bool:
    """Return whether people edit a file of an output afterwards, such as the README or the chat template.

    >>> is_editable("README.md"), is_editable("config.json"), is_editable("tokenizer.json")
    (True, False, False)
    """
    return _EDITABLE.fullmatch(name) is not None


def is_sound_name(name: str) -> bool:
    """Return whether one part of a path can be written on any file system and shown on a terminal."""
    plain = name not in ("", ".", "..") and not any(c in name for c in "/\\\0")
    return plain and name.isprintable() and len(name.encode()) <= _LONGEST


def is_sound_path(path: str) -> bool:
    """Return whether a relative path stays inside its folder, at most a few folders deep.

    >>> [is_sound_path(path) for path in ("1_Pooling/config.json", "../x", "/etc/passwd")]
    [True, False, False]
    """
    parts = path.split("/")
    return len(parts) <= DEEPEST and all(map(is_sound_name, parts))


DEEPEST = 5
"""Most parts of a path: the folders and the file."""
