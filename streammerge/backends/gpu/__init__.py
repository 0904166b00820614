"""The data path of GPUs: the driver, the pinned rings, memory on the device, and the order of copies and launches."""
