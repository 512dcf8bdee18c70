"""The choices that a block makes: the paper's, its ablations, and ours."""

from dataclasses import dataclass
from typing import Literal

from dynamixer.errors import UserError, did_you_mean

Generator = Literal["dynamic", "static", "dense"]
GENERATORS: tuple[Generator, ...] = ("dynamic", "static", "dense")


@dataclass(frozen=True)
class Mixing:
    """How a block mixes: the paper's choices by default, its ablations and options of ours as fields."""

    generator: Generator = "dynamic"
    softmax: bool = True
    static: bool = False
    row: bool = True
    column: bool = True
    channel: bool = True
    reweight: bool = True
    shared: bool = False
    windows: bool = True

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            UserError: a combination that would leave parameters without effect, or no mixing at all.
        """
        for key, value in vars(self).items():
            if key != "generator" and not isinstance(value, bool):
                raise UserError(f"{key}={value!r} has to be true or false.")
        if self.generator not in GENERATORS:
            raise UserError(f"unknown generator {self.generator!r}: {did_you_mean(str(self.generator), GENERATORS)}")
        if self.static and self.generator == "static":
            raise UserError(
                "static=True adds a static matrix to generated ones, but generator='static' has none to add it to."
            )
        if not (self.row or self.column):
            raise UserError("row=False and column=False together leave no mixing between tokens: keep one of them.")
        if self.shared and not (self.row and self.column):
            raise UserError("shared=True shares one operator between rows and columns, so neither can be left out.")
        if self.reweight and not self.channel and not (self.row and self.column):
            raise UserError("reweighting a single branch has no effect: add reweight=False, or keep a second branch.")

    @property
    def branches(self) -> int:
        """How many branches a block sums: of column, row and channel."""
        return self.row + self.column + self.channel
