"""Muon for the matrices of the decoder, beside Adam for all other parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's iteration, the authors'
SHARE = 2.0  # of the learning rate that gives updates the size of Adam's


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """What Muon updates: the weights of the decoder's layers, but for depthwise convolutions."""
    return {name: p for name, p in model.named_parameters()
            if name.startswith("decoder.") and p.ndim > 1 and p.shape[1] > 1}


class Muon:
    """Momentum with its singular values set to about 1 (Jordan et al. 2024).

    A convolution's weight is the matrix of its output channels and all else. Deviations from
    `torch.optim.Muon`, which reads its learning rate on the host: all matrices of a shape go at
    once, and a step can be captured in a CUDA graph. Updates are scaled as in Moonlight (Liu et al.
    2025, arXiv 2502.16982), to a multiple of the size of Adam's.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *, lr: Tensor):
        """
        Args:
            parameters: by name, see `matrices`.
            lr: scalar, read at every step.
        """
        self.lr = lr
        self.momentum = {name: torch.zeros_like(p, requires_grad=False)
                         for name, p in parameters.items()}
        names = defaultdict(list)
        for name, p in parameters.items():
            names[tuple(sorted(p.flatten(1).shape))].append(name)
        self.groups = list(names.values())
        self.streams = [torch.cuda.Stream(lr.device) for _ in self.groups] if lr.is_cuda else []

    @torch.no_grad()
    def step(self, gradient: Callable[[str], Tensor], add: Callable[[str, Tensor], None]) -> None:
        """One update of every matrix.

        Args:
            gradient: of a parameter by its name, in its shape.
            add: adds a change, in its shape, to a parameter.
        """
        if not self.streams:
            for names in self.groups:
                self._update(names, gradient, add)
            return
        main = torch.cuda.current_stream()
        for names, stream in zip(self.groups, self.streams):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):  # small kernels, side by side
                self._update(names, gradient, add)
        for stream in self.streams:
            main.wait_stream(stream)

    def _update(self, names: list[str], gradient: Callable[[str], Tensor],
                add: Callable[[str, Tensor], None]) -> None:
        updates = []
        for name in names:
            grad, momentum = gradient(name), self.momentum[name]
            momentum.lerp_(grad, 1 - MOMENTUM)
            update = torch.lerp(grad, momentum, MOMENTUM).flatten(1)
            updates.append(update.T if _is_tall(update) else update)
        stacked = torch.stack(updates)  # [N, r, c], r ≤ c
        changes = orthogonalise(stacked) * (-0.2 * SHARE * stacked.shape[2]**0.5 * self.lr)
        for name, change in zip(names, changes):
            momentum = self.momentum[name]
            change = change.T if _is_tall(momentum.flatten(1)) else change
            add(name, change.reshape(momentum.shape))


class MuonAdam(torch.optim.Adam):
    """`Muon` for the matrices of a model's decoder, Adam for its other parameters.

    The state of a matrix is its momentum, as `exp_avg`.
    """

    def __init__(self, model: nn.Module, *, lr: Tensor, **options):
        """
        Args:
            lr: scalar, of both.
            options: others, of Adam.
        """
        super().__init__(model.parameters(), lr=lr, **options)
        self.parameters = matrices(model)
        self.muon = Muon(self.parameters, lr=lr)
        self._share_momentum()

    def _share_momentum(self) -> None:
        for name, p in self.parameters.items():  # Adam asks for a step wherever there is a state
            self.state[p] = {"step": torch.zeros((), device=p.device),
                             "exp_avg": self.muon.momentum[name]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.muon.step(lambda name: self.parameters[name].grad,
                       lambda name, change: self.parameters[name].add_(change))
        for p in self.parameters.values():
            p.grad = None  # Adam passes over these
        super().step(closure)

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for name, p in self.parameters.items():
            self.muon.momentum[name].copy_(self.state[p]["exp_avg"])
        self._share_momentum()


def orthogonalise(x: Tensor) -> Tensor:
    """Singular values near 1 in place of matrices' own, by five steps of a polynomial.

    Args:
        x: [N, r, c] float32, r ≤ c.
    Returns:
        [N, r, c] float32; computed in bfloat16 on a GPU.
    """
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]
