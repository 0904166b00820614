"""A transformers model run layer by layer, its weights never resident together: examples in, activations out."""
