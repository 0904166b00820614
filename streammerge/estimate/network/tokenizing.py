"""Turn the lines of a file into a model's examples, with its own tokenizer, labels and limits."""

from __future__ import annotations

from typing import Any

from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import InputError, printable
from streammerge.estimate.network.examples import Reading, Tokenize
from streammerge.estimate.network.skeleton import CAUSAL, CURE, Skeleton
from streammerge.io.volumes import refuse_url


def reading_for(
    skeleton: Skeleton, index: TensorIndex, max_length: int, *, with_labels: bool = False
) -> Reading:
    """Return the settings for reading a model's examples, with labels if requested."""
    longest = min(max_length, skeleton.positions or max_length)
    return Reading(
        max_length=longest,
        min_length=2 if skeleton.kind == CAUSAL else 1,
        vocabulary=skeleton.vocabulary,
        tokenize=lambda: _tokenizer(index, longest),
        labels=skeleton.label_numbers if with_labels else None,
    )


def load_tokenizer(index: TensorIndex, cure: str) -> Any:
    """Return a model's tokenizer, as transformers loads it.

    Parameters
    ----------
    cure
        The end of the error message: what to do without a tokenizer.

    Raises
    ------
    InputError
        If there is no transformers, or it cannot load the tokenizer.
    """
    refuse_url(index.directory, index.reference, "transformers")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(f"transformers is needed to read text ({error}); {CURE}") from None
    try:
        return AutoTokenizer.from_pretrained(
            str(index.directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # foreign files may raise anything in the library
        raise InputError(
            f"{printable(index.reference)}: cannot load a tokenizer for text: "
            f"{printable(str(error).strip() or type(error).__name__, 300)}; {cure}"
        ) from error


def _tokenizer(index: TensorIndex, max_length: int) -> Tokenize:
    tokenizer = load_tokenizer(index, "give input_ids instead")

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        return ids

    return tokenize
