"""Tables in, paper figures out: `plots` draws, `style` sets the look, `save` writes .pdf, .png and .json."""

from hadamard_toolkit.plotting.ablation import ablation_grid
from hadamard_toolkit.plotting.attention import attention_norms, fit_comparison
from hadamard_toolkit.plotting.coefficients import coefficient_curves
from hadamard_toolkit.plotting.encoder_layer import sites
from hadamard_toolkit.plotting.export import Saved, publish, save, table_hash
from hadamard_toolkit.plotting.latex import SavedTable, save_table
from hadamard_toolkit.plotting.layer_ablation import (
    importance_by_layer,
    layers_kept_by_task,
    score_by_layers_kept,
)
from hadamard_toolkit.plotting.lowresource import score_against_rows
from hadamard_toolkit.plotting.masks import overlap_by_cell, overlap_matrices
from hadamard_toolkit.plotting.plots import score_by_method, training_curves, vectors_by_layer
from hadamard_toolkit.plotting.pruner import pruned_layers
from hadamard_toolkit.plotting.sharing import sharing_tradeoff
from hadamard_toolkit.plotting.similarity import (
    number_line,
    similarity_by_layer,
    similarity_matrices,
    transplant_gains,
)
from hadamard_toolkit.plotting.sparse import density_by_layer, score_against_sparsity
from hadamard_toolkit.plotting.style import WIDTHS, centred, frame, looks, new_figure, style
from hadamard_toolkit.plotting.tradeoff import score_against_parameters

__all__ = [
    "WIDTHS",
    "Saved",
    "SavedTable",
    "ablation_grid",
    "attention_norms",
    "centred",
    "coefficient_curves",
    "density_by_layer",
    "fit_comparison",
    "frame",
    "importance_by_layer",
    "layers_kept_by_task",
    "looks",
    "new_figure",
    "number_line",
    "overlap_by_cell",
    "overlap_matrices",
    "pruned_layers",
    "publish",
    "save",
    "save_table",
    "score_against_parameters",
    "score_against_rows",
    "score_against_sparsity",
    "score_by_layers_kept",
    "score_by_method",
    "sharing_tradeoff",
    "similarity_by_layer",
    "similarity_matrices",
    "sites",
    "style",
    "table_hash",
    "training_curves",
    "transplant_gains",
    "vectors_by_layer",
]
