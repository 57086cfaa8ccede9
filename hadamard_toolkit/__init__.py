"""Parameter-efficient tuning for research: train every adapter of three papers, then study what tuning does."""

from hadamard_toolkit.adapters.attachment import Attachment, attach, load_attachment
from hadamard_toolkit.adapters.hadamard import Hadamard
from hadamard_toolkit.adapters.interop import export_peft
from hadamard_toolkit.adapters.tuning import BitFit, FullFineTuning, HeadOnly, LayerNormTuning
from hadamard_toolkit.backbones import backbone_from_config, load_backbone
