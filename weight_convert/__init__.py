"""Reads and writes every LLaVA checkpoint layout; NumPy and the standard library only."""
