"""Run a transformers model layer by layer, with one layer's weights in memory at a time."""
