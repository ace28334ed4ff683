"""Prefill, decode, sampling, streaming, and the model object that people use."""
