"""Checkpoints of other projects, converted to plain transformers folders."""
