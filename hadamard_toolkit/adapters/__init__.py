"""Adapters: what is inserted where, and which parameters of the backbone train beside it."""

# Every module of adapters registers its own.
import hadamard_toolkit.adapters.bottleneck
import hadamard_toolkit.adapters.fusion
import hadamard_toolkit.adapters.hadamard
import hadamard_toolkit.adapters.ia3
import hadamard_toolkit.adapters.lora
import hadamard_toolkit.adapters.mam
import hadamard_toolkit.adapters.prefix
import hadamard_toolkit.adapters.prompt
import hadamard_toolkit.adapters.stack
import hadamard_toolkit.adapters.subspace
import hadamard_toolkit.adapters.tuning
import hadamard_toolkit.adapters.unipelt  # noqa: F401
