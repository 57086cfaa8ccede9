"""Measurements are made on whole tiny runs."""

from tests.runs.conftest import backbone_folder, data_root, make_spec

__all__ = ["backbone_folder", "data_root", "make_spec"]
