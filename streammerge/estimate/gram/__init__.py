"""Gram matrices of the inputs of linear maps, in Zarr stores, for RegMean."""
