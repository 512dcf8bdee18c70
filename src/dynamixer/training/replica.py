"""The model of one process: with its loss and its average, compiled, copied to or sharded over the other processes."""

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dynamixer.errors import UserError
from dynamixer.layers import AxisMixer
from dynamixer.logs import log
from dynamixer.precision import bf16_products
from dynamixer.speed.kernel import use_kernel
from dynamixer.training.config import TrainConfig
from dynamixer.training.objective import digest_of_teacher, dtype_of, make_task
from dynamixer.training.setup import Network
from dynamixer.training.world import World


class Replica:
    """What is trained (`model`, inside `task`) and what is kept of it (`ema`, if averaged).

    Args:
        config: compile, ema, kernel, parallel, precision and teacher are read.
        network: the model on its device, unwrapped; it is changed in place.
        classes: that the teacher has to know too.
        members: the processes that train together.
    """

    def __init__(self, config: TrainConfig, network: Network, classes: tuple[str, ...], members: World):
        self.config, self.model, self.members = config, network.model, members
        self.sharded = config.parallel == "fsdp2"
        _speed_up(config, self.model, members)
        self.ema = None
        if config.ema is not None:
            self.ema = ModelEmaV3(self.model, decay=config.ema, use_warmup=config.ema_warmup, foreach=not self.sharded)
        self.whole = copy.deepcopy(self.model).eval() if self.sharded else None  # to evaluate with
        if self.sharded:
            for module in self._modules().values():
                _shard(module, members)
        self.task = make_task(config, self.model, classes, network.sizes, members.device)
        self.teacher = digest_of_teacher(self.task)
        if config.compile:
            self.task.compile()
        if members.size > 1 and not self.sharded:
            self.task.prepare_distributed(device_ids=[members.device.index] if members.device.type == "cuda" else None)
            self._settle(network.sizes[0])

    def _settle(self, size: tuple[int, int]) -> None:
        """One backward pass for nothing: DDP orders its sums anew after its first, and a resumed run has to sum as before."""
        buffers = [b.clone() for b in self.model.buffers()]
        device = self.members.device
        with self.products():
            with self.autocast():
                pictures = torch.zeros(2, 3, *size, device=device, dtype=dtype_of(self.config))
                loss: Any = self.task(pictures, torch.zeros(2, dtype=torch.long, device=device))["loss"]
            loss.backward()
        self.model.zero_grad()
        self.put_buffers(buffers)

    def put_buffers(self, before: list[Tensor]) -> None:
        """Set running means and the like back to copies of themselves."""
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)

    def autocast(self) -> torch.autocast:
        """Mixed precision, where the configuration asks for it."""
        kind = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.members.device.type, kind, enabled=self.config.precision in ("bf16", "fp16"))

    def products(self) -> contextlib.AbstractContextManager[Any]:
        """How a forward and backward pass multiplies; a compiler makes its own choice."""
        return bf16_products(self.members.device, "fp32" if self.config.compile else self.config.precision)

    def no_sync(self) -> Any:
        """While it is entered, gradients are not yet summed over processes."""
        module = self.task.get_trainable_module()
        return module.no_sync() if hasattr(module, "no_sync") else contextlib.nullcontext()

    def average(self, updates: int) -> None:
        """Take the weights into the average, if there is one."""
        if self.ema is not None:
            self.ema.update(self.model, step=updates)

    @torch.no_grad()
    def kept(self) -> nn.Module:
        """The unsharded model with the weights that are evaluated and saved: the averaged ones, where there are any."""
        module: nn.Module = self.model if self.ema is None else self.ema.module
        if self.whole is None:
            return module
        values = module.state_dict().items()
        self.whole.load_state_dict({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in values})
        return self.whole

    def tensors(self) -> dict[str, Tensor]:
        """All weights and averages by name, sharded where they are."""
        modules = self._modules().items()
        return {f"{kind}.{key}": value for kind, module in modules for key, value in module.state_dict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Back from `tensors`."""
        for kind, module in self._modules().items():
            start = f"{kind}."
            module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, **({"ema": self.ema.module} if self.ema is not None else {})}


def _speed_up(config: TrainConfig, model: nn.Module, members: World) -> None:
    """On a processor the C++ kernel, where it can be used."""
    mixes = any(isinstance(part, AxisMixer) for part in model.modules())
    fits = members.device.type == "cpu" and config.precision != "fp64" and mixes
    if config.kernel == "on" and not fits:
        raise UserError("kernel=on is for DynaMixer models on processors in fp32, bf16 or fp16: leave it at auto.")
    if config.kernel == "off" or (config.kernel == "auto" and not fits):
        return
    try:
        use_kernel(model)
    except UserError as error:
        if config.kernel == "on":
            raise
        log(f"training without the C++ kernel: {error}")
        return
    native = getattr(model, "img_size", None)
    if others := [str(side) for side in config.sizes if (side, side) != native]:
        log(
            f"the C++ kernel mixes pictures of the native size: those of {', '.join(others)} px are computed without it, slower"
        )


def _shard(model: nn.Module, members: World) -> None:
    """FSDP2, layer by layer: weights, gradients and optimiser state in parts, one for each process."""
    mesh = init_device_mesh(members.device.type, (members.size,))
    for part in reversed(list(model.modules())):  # inner layers before those that hold them
        if isinstance(part, nn.ModuleList | nn.Sequential):
            for layer in part.children():
                if any(layer.children()) and any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
