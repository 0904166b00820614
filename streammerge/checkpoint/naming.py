"""Names by which config.json speaks of language models, whatever the architecture."""

from __future__ import annotations

LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")
"""The entry for the language model within a larger one."""
TIED = "tie_word_embeddings"
"""Whether the output head is the embedding."""
