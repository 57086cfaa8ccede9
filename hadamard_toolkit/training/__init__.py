"""Training: one protocol, one loop, every method."""

from hadamard_toolkit.training import protocols

__all__ = ["protocols"]
