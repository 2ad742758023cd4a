"""Baselines that join two models without training: text handed over, and mixed probabilities.

Axes: B row, T position, D and E the models' widths, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax.decoding import Generator, Sampling
from calm_jax.errors import CalmError
from calm_jax.models import Decoder, Inputs
from calm_jax.models.composed_cache import ComposedCache
from calm_jax.models.matching import check_vocabularies


class Mixture(nnx.Module):
    """Two decoders of one vocabulary, whose next-token probabilities are mixed.

    log p = (1 - weight) · log p_anchor + weight · log p_augment, up to a constant.

    Raises:
        CalmError: the vocabularies differ, or the weight is not from 0 to 1.
    """

    def __init__(self, anchor: Decoder, augment: Decoder, weight: float):
        if not 0 <= weight <= 1:
            raise CalmError(f"--mix_weight is {weight}; it must be from 0 to 1")
        check_vocabularies(anchor.vocabulary, "the anchor", augment.vocabulary, "the augment")
        self.anchor, self.augment, self.weight = anchor, augment, weight

    @property
    def models(self) -> list[Decoder]:
        return [self.anchor, self.augment]

    @property
    def vocabulary(self):
        return self.anchor.vocabulary

    def residual(
        self, inputs: Inputs, cache: ComposedCache | None = None
    ) -> tuple[jax.Array, ComposedCache | None]:
        """The residual streams of both side by side, [B, T, D + E], and the updated cache."""
        caches = (None, None) if cache is None else (cache.anchor, *cache.augments)
        x_BTD, anchor = self.anchor.residual(inputs, caches[0])
        x_BTE, augment = self.augment.residual(inputs, caches[1])
        if cache is not None:
            cache = dataclasses.replace(cache, anchor=anchor, augments=(augment,))
        return jnp.concatenate([x_BTD, x_BTE.astype(x_BTD.dtype)], axis=-1), cache

    def logits(self, x_BTX: jax.Array) -> jax.Array:
        """Mixed log-probabilities, float32 [B, T, V], V of the smaller vocabulary."""
        parts = jnp.split(x_BTX, [self.anchor.width], axis=-1)
        known = min(model.config.vocab_size for model in self.models)
        anchor_BTV, augment_BTV = (
            jax.nn.log_softmax(model.logits(x)[..., :known])
            for model, x in zip(self.models, parts, strict=True)
        )
        return (1 - self.weight) * anchor_BTV + self.weight * augment_BTV

    def init_cache(self, batch: int, slots: int, dtype: Any = None) -> ComposedCache:
        """An empty cache of both for `batch` rows of up to `slots` tokens."""
        anchor, augment = (model.init_cache(batch, slots, dtype=dtype) for model in self.models)
        return ComposedCache(anchor, (augment,), (), (None,), (None,))


@dataclasses.dataclass(frozen=True)
class HandOver:
    """How an augment's text comes into the anchor's prompt.

    Raises:
        CalmError: a template with an unknown field, or a `prompt` without the answer.
    """

    question: str = "{inputs}"  # what the augment is asked, where {inputs} is the prompt
    # what the anchor then reads, where {answer} is the augment's answer
    prompt: str = "{answer}\n{inputs}"
    # (text, replacement) in the prompt before it is put into `question`
    replace: tuple[str, str] | None = None

    def __post_init__(self):
        for name, known in (("question", ["inputs"]), ("prompt", ["inputs", "answer"])):
            try:
                getattr(self, name).format(**dict.fromkeys(known, ""))
            except (KeyError, IndexError, ValueError) as error:
                fields = " and ".join(f"{{{field}}}" for field in known)
                raise CalmError(
                    f"--hand_over_{name} is {getattr(self, name)!r}; its fields are {fields}"
                ) from error
        if "{answer}" not in self.prompt:
            raise CalmError(f"--hand_over_prompt is {self.prompt!r}; it must have an {{answer}}")

    def prompts(
        self, augment: Decoder, texts: Sequence[str], samplings: Sequence[Sampling], slots: int
    ) -> list[tuple[str, str]]:
        """The augment's answer to each text, and the prompt that results from it."""
        vocabulary = augment.vocabulary
        asked = [text.replace(*self.replace) if self.replace else text for text in texts]
        ids = [vocabulary.encode_sequence(self.question.format(inputs=text)) for text in asked]
        room = max(one.max_new_tokens for one in samplings)
        generator = Generator(augment, max_length=max(map(len, ids)) + room, slots=slots)
        found = []
        for text, (answer,) in zip(texts, generator.generate(ids, samplings), strict=True):
            if answer.error:
                raise CalmError(f"the augment, asked {text!r}: {answer.error}")
            said = answer.text
            found.append((said, self.prompt.format(inputs=text, answer=said)))
        return found
