"""A demonstration that runs in seconds: merges of four fine-tunes of a small network that ship with the package."""
