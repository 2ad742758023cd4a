"""What is scored in the place of a model: a control of a pair, or a baseline of two decoders."""

import dataclasses
import json
from typing import Any

import jax

from calm_jax.checkpoints.any_model import load_model
from calm_jax.checkpoints.files import absolute
from calm_jax.checkpoints.kinds import DECODER_RUN, FROZEN
from calm_jax.decoding import Generator
from calm_jax.errors import CalmError
from calm_jax.evaluation.baselines import HandOver, Mixture
from calm_jax.evaluation.controls import CONTROLS, OF_TAPS, PERMUTED, Recomputed, permute_augments
from calm_jax.evaluation.scored_model import scored_model


@dataclasses.dataclass(frozen=True)
class Variant:
    """A change of the scored model, at most one; none by default.

    Raises:
        CalmError: several changes, or an unknown control.
    """

    control: str = ""  # a name of `CONTROLS`: how the augments of a pair are destroyed
    mix: str = ""  # folder of a decoder whose probabilities are mixed into those of a decoder
    mix_weight: float = 0.5  # its weight, from 0 to 1
    hand_over: str = ""  # folder of a decoder whose answers come into the prompts of a decoder
    rule: HandOver = dataclasses.field(default_factory=HandOver)  # how they come in

    def __post_init__(self):
        given = [name for name in ("control", "mix", "hand_over") if getattr(self, name)]
        if len(given) > 1:
            raise CalmError(f"--{given[0]} and --{given[1]} cannot be given together")
        if self.control and self.control not in CONTROLS:
            raise CalmError(f"--control={self.control}; known are {', '.join(CONTROLS)}")

    @property
    def name(self) -> str:
        """A name for its results; "" without a change."""
        return self.control or (self.mix and "mixed") or (self.hand_over and "handed_over")

    def described(self) -> dict[str, Any]:
        """The change as JSON, and which the second model is."""
        found = json.loads(json.dumps(dataclasses.asdict(self)))
        if place := self.mix or self.hand_over:
            found["other"] = scored_model(absolute(place))
        return found

    def check(self, kind: str, folder: Any) -> None:
        """Raises `CalmError` if a model of this kind cannot be changed so."""
        is_decoder = kind in (DECODER_RUN, FROZEN)
        if self.control and is_decoder:
            raise CalmError(f"--control={self.control}: {folder} is {kind}, which has no augment")
        if (self.mix or self.hand_over) and not is_decoder:
            flag = "--mix" if self.mix else "--hand_over"
            raise CalmError(f"{flag}: {folder} is {kind}; give the anchor as --model")

    def changed(self, model: Any, mesh: jax.sharding.Mesh | None) -> Any:
        """The model to score in the place of `model`."""
        if self.control == PERMUTED:
            permute_augments(model)
        if self.mix:
            return Mixture(model, load_model(self.mix, mesh=mesh), self.mix_weight)
        return model

    def handing(self, mesh: jax.sharding.Mesh | None) -> Any:
        """The decoder whose answers come into the prompts, or None."""
        return load_model(self.hand_over, mesh=mesh) if self.hand_over else None

    def generator(self, model: Any, length: int, slots: int) -> Generator | Recomputed:
        """What answers the prompts: up to `slots` at once, of up to `length` tokens each."""
        if self.control in OF_TAPS:
            return Recomputed(model, self.control, slots=slots)
        return Generator(model, max_length=length, slots=slots)
