"""Fisher diagonals in Zarr: writing stores, importing what others estimated, and what a store says."""
