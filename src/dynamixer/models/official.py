"""Weights in the layout of the published code, read into our models.

The published matrices are stored as [input token, output token] and softmaxed over the input; ours are the paper's row
softmax, [output token, input token], so the generator's outputs are reordered. Everything else only changes its name.
"""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dynamixer.errors import UserError

_BLOCK = {
    "norm1": "norm1",
    "mixer.column.reduce": "attn.mix_h.compress",
    "mixer.column.generate": "attn.mix_h.generate",
    "mixer.column.project": "attn.mix_h.out",
    "mixer.row.reduce": "attn.mix_w.compress",
    "mixer.row.generate": "attn.mix_w.generate",
    "mixer.row.project": "attn.mix_w.out",
    "mixer.channel": "attn.mlp_c",
    "mixer.reweight": "attn.reweight",
    "mixer.project": "attn.proj",
    "norm2": "norm2",
    "mlp": "mlp",
}
_WRAPPERS = ("state_dict_ema", "state_dict", "model_ema", "model")


def load_official(
    model: nn.Module, path_or_state_dict: str | Path | Mapping[str, Tensor], *, head: bool = True
) -> None:
    """Load weights that the published DynaMixer code (or one of its layout) saved.

    Args:
        model: a DynaMixer of the same configuration, for example `timm.create_model("dynamixer_s")`.
        path_or_state_dict: a .safetensors file, a torch checkpoint (read with weights_only, nothing in it is executed), or
            a state dict. A `module.` prefix is dropped. Of several wrapped state dicts the averaged one
            (`state_dict_ema`) is taken, as it is the one whose accuracy selects a checkpoint in the paper's recipe.
        head: load the classifier too. With False the model's own is left as it is, so that another class count loads.

    Raises:
        UserError: the file cannot be read, or keys are missing, unexpected or misshapen: all of them are listed, and the
            model is left as it was.
    """
    given = _unwrap(path_or_state_dict if isinstance(path_or_state_dict, Mapping) else _read(Path(path_or_state_dict)))
    own = model.state_dict()
    names = {ours: _published_name(ours, model) for ours in own}
    if not head:
        names = {ours: theirs for ours, theirs in names.items() if not theirs.startswith("head.")}
        given = {key: value for key, value in given.items() if not key.startswith("head.")}
    missing = sorted(set(names.values()) - set(given))
    unexpected = sorted(set(given) - set(names.values()))
    misshapen = [
        f"{theirs} {tuple(given[theirs].shape)}, not {tuple(own[ours].shape)}"
        for ours, theirs in names.items()
        if theirs in given and given[theirs].shape != own[ours].shape
    ]
    problems = [
        f"{what}: {', '.join(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        hint = " (head=False leaves the classifier out)" if head and any("head." in p for p in problems) else ""
        raise UserError(f"these weights do not fit this model{hint}; " + "; ".join(problems))
    loaded = {
        ours: _output_major(given[theirs]) if ".generate." in ours else given[theirs] for ours, theirs in names.items()
    }
    model.load_state_dict(loaded, strict=head)


def _output_major(value: Tensor) -> Tensor:
    """Generator rows from (input token, output token) to (output token, input token)."""
    length = round(len(value) ** 0.5)
    return value.unflatten(0, (length, length)).transpose(0, 1).flatten(0, 1)


def _published_name(ours: str, model: nn.Module) -> str:
    parts = ours.split(".")
    if parts[0] != "stages":
        return ours
    # The published list of stages counts a down-sampling as an entry of its own.
    stage = int(parts[1])
    entry = stage + sum(s.downsample is not None for s in list(model.stages)[: stage + 1])  # type: ignore[arg-type]
    if parts[2] == "downsample":
        return ".".join([f"network.{entry - 1}", *parts[3:]])
    inner = ".".join(parts[4:])
    for prefix, published in _BLOCK.items():
        if inner.startswith(prefix + "."):
            return f"network.{entry}.{parts[3]}.{published}{inner.removeprefix(prefix)}"
    return ours  # an option of ours: no published name, so the loader reports it as missing


def _read(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise UserError(f"no file {path}: give the path of published weights (.safetensors, .pth, .pt).")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # published checkpoints carry their arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict.")
    return content


def _unwrap(content: Mapping[str, object]) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, Mapping):
            return _unwrap(inner)
    found = {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    if not found:
        raise UserError(
            "there are no tensors in this checkpoint: a state dict, or one under 'state_dict' or 'model', is needed."
        )
    return found
