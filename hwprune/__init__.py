"""Prune vision transformers and diffusion models to a latency, energy, size or FLOP budget."""

__version__ = "0.1.0"
