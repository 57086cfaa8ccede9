# The public names, one line per module.
from . import plotting as plotting, studies as studies
from .adapters.attachment import Attachment as Attachment, attach as attach
from .adapters.base import Adapter as Adapter, SiteModule as SiteModule, register as register
from .adapters.bases import Basis as Basis, load_basis as load_basis, save_basis as save_basis
from .adapters.bottleneck import Houlsby as Houlsby, ParallelAdapter as ParallelAdapter, Pfeiffer as Pfeiffer
from .adapters.counting import parameter_counts as parameter_counts
from .adapters.fusion import AdapterFusion as AdapterFusion, fuse as fuse, load_adapters as load_adapters
from .adapters.hadamard import Hadamard as Hadamard
from .adapters.ia3 import IA3 as IA3
from .adapters.loading import load_attachment as load_attachment
from .adapters.lora import LoRA as LoRA
from .adapters.mam import MAM as MAM
from .adapters.prefix import PrefixTuning as PrefixTuning
from .adapters.prompt import PromptTuning as PromptTuning
from .adapters.stack import Stack as Stack
from .adapters.subspace import Subspace as Subspace
from .adapters.tuning import (
    BitFit as BitFit,
    FullFineTuning as FullFineTuning,
    HeadOnly as HeadOnly,
    LayerNormTuning as LayerNormTuning,
)
from .adapters.unipelt import (
    UniPELT as UniPELT,
    ia3_prefix_bottleneck as ia3_prefix_bottleneck,
    prompt_unipelt as prompt_unipelt,
    stacked_unipelt as stacked_unipelt,
)
from .backbones import backbone_from_config as backbone_from_config, load_backbone as load_backbone
from .errors import (
    ArgumentError as ArgumentError,
    DataError as DataError,
    DownloadError as DownloadError,
    MissingExtraError as MissingExtraError,
    StoreError as StoreError,
    ToolkitError as ToolkitError,
    TrainingError as TrainingError,
    UnsupportedError as UnsupportedError,
)
from .interop.peft import export_peft as export_peft, import_peft as import_peft
from .measurements.gates import record_gates as record_gates
from .runs.environment import __version__ as __version__
from .runs.plan import large_sparse_plan as large_sparse_plan
from .runs.reference import reference as reference
from .runs.run import run as run
from .runs.spec import RunSpec as RunSpec
from .runs.store import RunStore as RunStore
from .runs.sweep import sweep as sweep
from .sparsity.budgets import large_sparse as large_sparse
from .sparsity.controls import controls as controls
from .sparsity.masks import Masks as Masks
from .sparsity.prune import sparsify as sparsify
from .sparsity.schedule import GradualPruning as GradualPruning
from .sparsity.spec import Sparsity as Sparsity
from .tasks import Task as Task, load_task as load_task
from .training import protocols as protocols
from .training.feature_store import FeatureStore as FeatureStore
from .training.loop import Outcome as Outcome, train as train
from .training.protocol import Protocol as Protocol
from .training.pruning import draw_batches as draw_batches
from .training.routing import Router as Router, route as route
from .widgets.pruner import LayerPruner as LayerPruner
from .widgets.pruning_state import PruningState as PruningState
