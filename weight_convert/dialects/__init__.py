"""Checkpoint layouts: what each is recognised by, and its names for the canonical tensors."""
