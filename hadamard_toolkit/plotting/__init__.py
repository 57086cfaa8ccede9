"""Tables in, paper figures out: `plots` draws, `style` sets the look, `save` writes .pdf, .png and .json."""

from hadamard_toolkit.plotting.export import Saved, save, table_hash
from hadamard_toolkit.plotting.lowresource import score_against_rows
from hadamard_toolkit.plotting.plots import score_by_method, training_curves, vectors_by_layer
from hadamard_toolkit.plotting.sparse import density_by_layer, score_against_sparsity
from hadamard_toolkit.plotting.style import WIDTHS, centred, frame, looks, new_figure, style
from hadamard_toolkit.plotting.tradeoff import score_against_parameters

__all__ = [
    "WIDTHS",
    "Saved",
    "centred",
    "density_by_layer",
    "frame",
    "looks",
    "new_figure",
    "save",
    "score_against_parameters",
    "score_against_rows",
    "score_against_sparsity",
    "score_by_method",
    "style",
    "table_hash",
    "training_curves",
    "vectors_by_layer",
]
