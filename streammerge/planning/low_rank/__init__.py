"""Adapters in place of merged models: which tensors become factors, which are stored whole, and what PEFT is told."""
