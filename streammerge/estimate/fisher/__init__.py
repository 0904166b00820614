"""Estimate Fisher diagonals, import existing ones, and describe their Zarr stores."""
