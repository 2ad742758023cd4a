"""Prepares a model for decoding: f_proj is absorbed, and on one CPU device layers become a list.

f_cross' keys and values are products of two matrices with a tap. Instead, the two matrices are
multiplied once, as in multi-head latent attention.

Reading the weights bounds the speed of decoding. XLA's CPU backend copies a layer out of a stack
before it multiplies, which takes four times as long as the product itself; so on a CPU the layers
are views of the stack, without a copy. Accelerators read a layer in place in the stack.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, Decoder
from calm_jax.models.connections import plan_connections
from calm_jax.models.stack import are_stacked
from calm_jax.models.taps import item_shape


def prepared(model: Decoder | ComposedDecoder) -> Decoder | ComposedDecoder:
    """A model that computes the same from the same weights, in the form that decodes fastest."""
    graphdef, state = nnx.split(model)
    state = jax.tree.map(jnp.asarray, state)  # NumPy arrays have no device
    model, arrays = nnx.merge(graphdef, state), jax.tree.leaves(state)
    devices = {device for x in arrays for device in x.sharding.device_set}
    if isinstance(model, ComposedDecoder):
        model.bridge.rounds = nnx.List(
            [
                nnx.List([_absorbed(cross_attention) for cross_attention in round_])
                for round_ in model.bridge.rounds
            ]
        )
    return _apart(model) if [device.platform for device in devices] == ["cpu"] else model


def rows_of_tables(model: Decoder | ComposedDecoder) -> int:
    """The number of ids, from 0, that all parts of a model embed which read the same tokens.

    Raises `CalmError` for an augment that reads tokens and is no decoder: it has no table, nor a
    cache of rows.
    """
    for number, augment in enumerate(model.models[1:]):
        if not isinstance(augment, Decoder) and item_shape(augment) is None:
            kind = type(augment).__name__
            raise CalmError(f"augment {number} is a {kind}; only decoders can be decoded")
    own_tokens = (False, *getattr(model, "own_tokens", ()))
    return min(
        part.config.vocab_size
        for part, own in itertools.zip_longest(model.models, own_tokens, fillvalue=False)
        if not own
    )


def known_ids(model: Decoder | ComposedDecoder) -> int:
    """The number of ids, from 0, that may be chosen: those that are embedded and have a meaning."""
    rows, vocabulary = rows_of_tables(model), model.vocabulary
    return rows if vocabulary is None else min(rows, vocabulary.size)


def _absorbed(cross_attention: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(cross_attention)
    after = nnx.eval_shape(lambda state: nnx.merge(graphdef, state).absorbed(), state)
    # Programs that run at once may exchange data in a different order in each process.
    return nnx.merge(nnx.graphdef(after), jax.block_until_ready(_absorb(graphdef, state)))


@functools.partial(jax.jit, static_argnums=0)
def _absorb(graphdef: nnx.GraphDef, state: nnx.State) -> nnx.State:
    return nnx.state(nnx.merge(graphdef, state).absorbed())


def _apart(model: Any) -> Any:
    copy = nnx.merge(*nnx.split(model))
    if isinstance(model, ComposedDecoder):
        copy.anchor = _apart(model.anchor)
        copy.augments = nnx.List([_apart(augment) for augment in model.augments])
        copy.configs = tuple(dataclasses.replace(config, scan=False) for config in model.configs)
        depths = [augment.depth for augment in model.augments]
        copy.plan = plan_connections(copy.configs, model.anchor.depth, depths)
        rounds = []
        for round_, modules in zip(model.plan.rounds, model.bridge.rounds, strict=True):
            steps = range(len(round_.entries[0])) if round_.stacked else [None]
            rounds += [nnx.List([_view(module, step) for module in modules]) for step in steps]
        copy.bridge.rounds = nnx.List(rounds)
    elif isinstance(model, Decoder) and are_stacked(model.layers):
        copy.layers = nnx.List([_view(model.layers, layer) for layer in range(model.depth)])
    else:
        for name, part in vars(model).items():
            if isinstance(part, Decoder):
                setattr(copy, name, _apart(part))
    return copy


def _view(stack: nnx.Module, number: int | None) -> nnx.Module:
    """One module of a stack; None: the module itself, which is not stacked."""
    if number is None:
        return stack
    graphdef, state = nnx.split(stack)
    (device,) = jax.tree.leaves(state)[0].sharding.device_set
    views = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x)[number], device, may_alias=True), state
    )
    return nnx.merge(graphdef, views)
