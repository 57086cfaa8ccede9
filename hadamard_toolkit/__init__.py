"""Parameter-efficient tuning for research: train every adapter of three papers, then study what tuning does.

The public names are listed in `__init__.pyi`. They are loaded on first use, so that `import hadamard_toolkit` and the
command line's `--help` do not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
