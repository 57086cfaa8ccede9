"""Scores by which entries are removed, lowest first. One function each; all give tensors by parameter name.

θ are the maskable parameters, L the mean loss over all examples of the batches, m the mask as a factor of θ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hadamard_toolkit.adapters.attachment import Attachment
from hadamard_toolkit.adapters.base import Insertion
from hadamard_toolkit.adapters.gates import Gate, Input
from hadamard_toolkit.errors import ArgumentError, DataError, UnsupportedError
from hadamard_toolkit.sites import features
from hadamard_toolkit.sparsity.batches import Batches

_STREAM = 0x5C02E  # keeps the noise of random scores apart from that of initial weights under the same seed
Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Scene:
    """What a scorer sees. Removed entries of earlier rounds are zero in `parameters` and False in `kept`."""

    attachment: Attachment
    parameters: Mapping[str, nn.Parameter]
    kept: Mapping[str, Tensor]
    batches: Batches
    seed: int

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device


@dataclass(frozen=True)
class Scorer:
    """`score` computes the scores. It may need `data`, it may be `blind` to values (so that ties are no error), and it
    may be `adaptive`: scores change with what is removed, and further rounds make a difference."""

    score: Callable[[Scene], Scores]
    data: bool = False
    blind: bool = False
    adaptive: bool = False


def random_scores(scene: Scene) -> Scores:
    """N(0, 1) noise of the scene's seed."""
    noise = np.random.default_rng([scene.seed, _STREAM])
    return {
        name: torch.from_numpy(np.asarray(noise.standard_normal(tuple(parameter.shape), np.float32)))
        for name, parameter in scene.parameters.items()
    }


def magnitude_scores(scene: Scene) -> Scores:
    """|θ|."""
    return {name: parameter.detach().abs() for name, parameter in scene.parameters.items()}


def snip_scores(scene: Scene) -> Scores:
    """|∂L/∂m| = |θ ⊙ ∂L/∂θ| at the current mask (Lee et al. 2019; their normaliser changes no rank)."""
    gradient = _gradient(scene)
    return {name: (p.detach() * gradient[name]).abs() for name, p in scene.parameters.items()}


def grasp_scores(scene: Scene) -> Scores:
    """θ ⊙ (H g), signed: the largest stay (Wang et al. 2020, their score with the sign turned, no temperature).

    Removing an entry changes the squared gradient norm by -2 θ H g to first order, so what goes is what raises it most.
    H is the Hessian of L, g = ∂L/∂θ over all batches, kept entries only; H g by a second backward pass.
    """
    parameters = list(scene.parameters.values())
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        gradient = _gradient(scene)
        direction = [gradient[name] * scene.kept[name] for name in scene.parameters]
        product = [torch.zeros_like(parameter) for parameter in parameters]
        for batch, share in scene.batches.on(scene.device):
            first = _grad(share * _loss(scene, batch), parameters, create_graph=True)
            along = sum((f * d).sum() for f, d in zip(first, direction, strict=True))
            for total, part in zip(product, _grad(along, parameters), strict=True):
                total += part
    return {name: p.detach() * hg for (name, p), hg in zip(scene.parameters.items(), product, strict=True)}


def synflow_scores(scene: Scene) -> Scores:
    """|θ ⊙ ∂R/∂θ|, R the sum of the outputs of each part of the adapter for an all-ones input and weights |θ|.

    No data. Each part in isolation, as SparseAdapter has it; Tanaka et al. 2020 send ones through the whole network.
    """
    scores: Scores = {}
    names = {id(parameter): name for name, parameter in scene.parameters.items()}
    for insertion in scene.attachment.insertions.values():
        parameters = [p for p in insertion.module.parameters() if id(p) in names]
        if parameters:
            for parameter, flow in zip(parameters, _flow(insertion, parameters), strict=True):
                scores[names[id(parameter)]] = (parameter.detach() * flow).abs()
    if others := [name for name in scene.parameters if name not in scores]:
        raise UnsupportedError(
            f"synflow scores parts of the adapter, and {others[0]!r} is none; choose another scorer"
        )
    return scores


SCORERS = {
    "random": Scorer(random_scores, blind=True),
    "magnitude": Scorer(magnitude_scores),
    "erdos-renyi": Scorer(random_scores, blind=True),  # random inside a tensor; `allocate` sets the densities
    "snip": Scorer(snip_scores, data=True, adaptive=True),
    "grasp": Scorer(grasp_scores, data=True, adaptive=True),
    "synflow": Scorer(synflow_scores, adaptive=True),
}


@contextmanager
def scoring(attachment: Attachment, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, float32 (float64 stays), gradients for exactly `parameters`; everything is put back."""
    model = attachment.model
    modes = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tensors = chain(model.parameters(), model.buffers())
    half = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    try:
        model.eval().requires_grad_(False)
        for tensor, _ in half:
            tensor.data = tensor.data.float()
        for parameter in parameters:
            parameter.requires_grad_(True)
        device = parameters[0].device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False), torch.enable_grad():
            yield
    finally:
        for tensor, dtype in half:
            tensor.data = tensor.data.to(dtype)  # exact, as nothing was changed
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _gradient(scene: Scene) -> Scores:
    """∂L/∂θ, accumulated over all batches."""
    parameters = list(scene.parameters.values())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for batch, share in scene.batches.on(scene.device):
        for sum_, part in zip(total, _grad(_loss(scene, batch), parameters), strict=True):
            sum_.add_(part, alpha=share)
    return dict(zip(scene.parameters, total, strict=True))


def _loss(scene: Scene, batch: dict[str, Tensor]) -> Tensor:
    loss = scene.attachment.model(**batch).loss
    if not torch.isfinite(loss):
        raise DataError(f"the loss on a scoring batch is {loss.item()}; scores need finite losses")
    return loss


def _grad(
    output: Tensor | float, parameters: list[nn.Parameter], *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    if not isinstance(output, Tensor) or not output.requires_grad:
        raise ArgumentError("the loss does not depend on the maskable parameters; is the adapter enabled?")
    return torch.autograd.grad(output, parameters, create_graph=create_graph, materialize_grads=True)


def _flow(insertion: Insertion, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """∂R/∂θ of `parameters` of one part at |θ|; its values are as before afterwards."""
    part, site = insertion.module, insertion.site
    if "hidden" not in inspect.signature(part.forward).parameters:
        raise UnsupportedError(
            f"{type(part).__name__} reads no input that synflow could fill with ones; choose another scorer"
        )
    values = [(parameter, parameter.detach().clone()) for parameter in part.parameters()]
    hosted = site.side == "output" and site.module.weight.ndim == 2
    read = insertion.source.width if insertion.source else features(site.module)[0] if hosted else site.width
    ones = torch.ones(1, 1, max(site.width, read), dtype=parameters[0].dtype, device=parameters[0].device)
    try:
        with torch.no_grad():
            for parameter, _ in values:
                parameter.abs_()
        with ExitStack() as stack:
            for module in part.modules():
                if isinstance(module, Gate):
                    stack.enter_context(module.current.reading(Input((1, 1), None)))
            output = part(ones[..., : site.width], ones[..., :read])
        return _grad(output.sum(), parameters)
    finally:
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
