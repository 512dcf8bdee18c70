"""One training step, for benchmarks."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TrainingStep:
    """Forward, loss, backward and AdamW, on the same pictures each time; `products` is entered around all of it."""

    def __init__(
        self, model: nn.Module, pictures: Tensor, autocast: Callable[[], Any], products: Callable[[], Any] = nullcontext
    ):
        self.model, self.pictures = copy.deepcopy(model).train(), pictures
        self.autocast, self.products = autocast, products
        self.labels = torch.arange(len(pictures)) % 10
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def loss(self) -> Tensor:
        """Of one forward pass."""
        with self.autocast():
            logits = self.model(self.pictures)
        return F.cross_entropy(logits.float(), self.labels)

    def __call__(self) -> None:
        """One step."""
        with self.products():
            self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept(self) -> float:
        """MiB that a forward pass keeps for the backward pass, weights left out."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.loss()
        return sum(kept.values()) / 2**20
