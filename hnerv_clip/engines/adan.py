"""Adan (Xie et al. 2022, arXiv 2208.06677), in PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.98, 0.92, 0.99)  # the authors' defaults: of the mean, its differences, the square
EPS = 1e-8
STATE = ("exp_avg", "exp_avg_sq", "exp_avg_diff", "previous_grad")  # of each parameter


class Adan(torch.optim.Optimizer):
    """Adam with the mean of the gradient's differences beside that of the gradient.

    Without weight decay and restarts, as HNeRV-Boost uses it. A step reads nothing on the host, so
    that a CUDA graph can hold it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] | list[dict[str, Any]], *, lr: Tensor):
        """
        Args:
            parameters: or groups of them, as of any optimizer of PyTorch.
            lr: scalar, read at every step; of groups that have none of their own.
        """
        # capturable: a loaded count of steps goes to the parameter's device
        super().__init__(parameters, {"lr": lr, "capturable": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient; all have taken the same number of steps."""
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._step(parameters, group["lr"])

    def _step(self, parameters: list[nn.Parameter], lr: Tensor) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), device=p.device)} | {
                    name: torch.zeros_like(p) for name in STATE}
        states, grads = [self.state[p] for p in parameters], [p.grad for p in parameters]
        mean, square, diff, previous = ([s[name] for s in states] for name in STATE)
        torch._foreach_add_([s["step"] for s in states], 1)
        step = states[0]["step"]
        beta1, beta2, beta3 = BETAS
        correction1, correction2, correction3 = (1 - beta**step for beta in BETAS)

        change = torch._foreach_sub(grads, previous)
        torch._foreach_mul_(change, (step > 1).float())
        ahead = torch._foreach_add(grads, change, alpha=beta2)
        torch._foreach_lerp_(mean, grads, 1 - beta1)
        torch._foreach_lerp_(diff, change, 1 - beta2)
        torch._foreach_mul_(square, beta3)
        torch._foreach_addcmul_(square, ahead, ahead, 1 - beta3)
        torch._foreach_copy_(previous, grads)

        update = torch._foreach_mul(diff, beta2 / correction2)
        torch._foreach_add_(update, torch._foreach_div(mean, correction1))
        size = torch._foreach_sqrt(square)
        torch._foreach_div_(size, correction3.sqrt())
        torch._foreach_add_(size, EPS)
        torch._foreach_div_(update, size)
        torch._foreach_mul_(update, lr)
        torch._foreach_sub_(parameters, update)
