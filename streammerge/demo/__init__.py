"""A merge that runs in seconds: four fine-tunes of one small network, shipped with the package."""
