"""Studies: pure functions, arrays or a store in, tidy tables out; no plotting."""

from hadamard_toolkit.studies.ablation import ablation_table, component_effects
from hadamard_toolkit.studies.attention_shift import (
    cka_debiased,
    cka_summary,
    fit_summary,
    norm_shift,
    polynomial_fits,
)
from hadamard_toolkit.studies.kinship import cluster_tasks, mantel
from hadamard_toolkit.studies.layer_ablation import (
    greedy_elimination,
    layer_importance,
    leave_one_out,
    removal_curves,
    removal_paths,
    subset_band,
    taylor_scores,
)
from hadamard_toolkit.studies.layer_ablation_tests import (
    against_chance,
    better_than_chance,
    rank_agreement,
)
from hadamard_toolkit.studies.mask_statistics import (
    dead_units,
    density_table,
    mask_runs,
    overlap,
    overlap_cells,
    overlap_table,
    score_agreement,
)
from hadamard_toolkit.studies.sharing import goal_reached, sharing_by_task, sharing_summary
from hadamard_toolkit.studies.similarity import (
    ALL_LAYERS,
    share_text,
    similarity_contrast,
    similarity_matrix,
    similarity_summary,
    vector_similarity,
)
from hadamard_toolkit.studies.statistics import (
    hierarchical_bootstrap,
    holm,
    mcnemar,
    mean_over,
    paired_tests,
    power,
    tost,
)
from hadamard_toolkit.studies.sufficient import kept_share, smallest_set
from hadamard_toolkit.studies.tables import (
    constant_score,
    history_table,
    mark_failed,
    measured_table,
    normalised_scores,
    score_table,
    sparse_table,
    vector_table,
)

__all__ = [
    "ALL_LAYERS",
    "ablation_table",
    "against_chance",
    "better_than_chance",
    "cka_debiased",
    "cka_summary",
    "cluster_tasks",
    "component_effects",
    "constant_score",
    "dead_units",
    "density_table",
    "fit_summary",
    "goal_reached",
    "greedy_elimination",
    "hierarchical_bootstrap",
    "history_table",
    "holm",
    "kept_share",
    "layer_importance",
    "leave_one_out",
    "mantel",
    "mark_failed",
    "mask_runs",
    "mcnemar",
    "mean_over",
    "measured_table",
    "norm_shift",
    "normalised_scores",
    "overlap",
    "overlap_cells",
    "overlap_table",
    "paired_tests",
    "polynomial_fits",
    "power",
    "rank_agreement",
    "removal_curves",
    "removal_paths",
    "score_agreement",
    "score_table",
    "share_text",
    "sharing_by_task",
    "sharing_summary",
    "similarity_contrast",
    "similarity_matrix",
    "similarity_summary",
    "smallest_set",
    "sparse_table",
    "subset_band",
    "taylor_scores",
    "tost",
    "vector_similarity",
    "vector_table",
]
