"""A merge on a Ray cluster: its driver, the actors that hold an engine each, and what they may use of the cluster."""
