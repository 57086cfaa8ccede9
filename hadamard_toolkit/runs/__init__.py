"""Runs: what to train (`spec`), training it once (`run`), many of them (`sweep`), their records (`store`)."""
