"""Compute the gates of a mixture of experts from prompts."""
