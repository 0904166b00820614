"""Quantised tensors as they are stored, for a device that decodes them: codes and scales travel, not the values."""
