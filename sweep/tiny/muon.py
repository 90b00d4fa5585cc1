"""Muon, an optimiser for weight matrices, in float32: PyTorch's own works in bfloat16, slow on many CPUs."""

from collections import defaultdict
from collections.abc import Iterable

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made nearly orthogonal by four Newton-Schulz steps.

    The update is scaled to the size of AdamW's, so that the learning rates are of the same order.

    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon; the scale is that of arXiv 2502.16982.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        """Take matrices only; vectors and embeddings belong to AdamW."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix once; matrices of one shape are made orthogonal together."""
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"])
                same_shape[matrix.shape].append((matrix, update))
            for (rows, columns), pairs in same_shape.items():
                updates = _orthogonal(torch.stack([update for _, update in pairs]))
                size = 0.2 * max(rows, columns) ** 0.5
                for (matrix, _), update in zip(pairs, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-group["lr"] * size)


def _orthogonal(stack: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrix of each in [count, rows, columns]."""
    if stack.shape[1] > stack.shape[2]:
        return _orthogonal(stack.mT).mT
    stack = stack / (stack.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(4):
        square = stack @ stack.mT
        stack = 3.4445 * stack + (-4.7750 * square + 2.0315 * square @ square) @ stack
    return stack
