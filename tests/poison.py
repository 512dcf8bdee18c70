"""Training steps with something in them that is not finite."""

import json
import math

import torch

from dynamixer.training import engine


class Poison:
    """Puts what is not finite into chosen steps, and looks at the run before and after each."""

    def __init__(self, monkeypatch, steps, where, everywhere=True):
        self.steps, self.where, self.before, self.changed = steps, where, None, []
        real = engine._Run._step

        def step(run, number, loader, meter):
            before = self.picture_of(run)
            here = number in steps and (everywhere or run.world.rank == 1)
            if here:
                loader = map(self.spoil, loader) if where != "gradient" else loader
                if where == "gradient":
                    hook = next(iter(run.model.parameters())).register_hook(lambda g: g * math.inf)
            real(run, number, loader, meter)
            if here and where == "gradient":
                hook.remove()
            after = self.picture_of(run)
            self.changed.append(
                any(not torch.equal(before[key], after[key]) for key in before) or set(before) != set(after)
            )

        monkeypatch.setattr(engine._Run, "_step", step)

    def spoil(self, batch):
        batch.pictures[0, 0, 0, 0] = math.nan if self.where == "input" else 3e38
        return batch

    @staticmethod
    def picture_of(run):
        tensors, about = engine.optimizer_state.take(run.optimizer)
        numbers = {"scalars": torch.frombuffer(bytearray(json.dumps(about["scalars"]).encode()), dtype=torch.uint8)}
        return {key: value.clone() for key, value in (run.replica.tensors() | tensors | numbers).items()}
