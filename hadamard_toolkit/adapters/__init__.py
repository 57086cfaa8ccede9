"""Adapters: what is inserted where, and which parameters of the backbone train beside it."""
