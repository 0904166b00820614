"""Gram matrices of what goes into linear maps, in Zarr stores: how a model uses its weights (RegMean)."""
