"""Studies: pure functions, arrays or a store in, tidy tables out; no plotting."""

from hadamard_toolkit.studies.tables import history_table, score_table, vector_table

__all__ = ["history_table", "score_table", "vector_table"]
