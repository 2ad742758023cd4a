"""Chooses connections by data: a linear probe of every tap for what the anchor lacks.

After anchor layer j the gradient of the loss says, for each token, what would have to be added to
the stream to answer better. A part of it can be predicted from the stream itself, which a bridge is
not needed for. From the rest, a ridge regression on an augment's state after layer i at the same
token predicts what a connection (i, j) could tell the anchor; `Gains` says what that is worth on
batches that the regression was not fitted on. The probe sees no attention: it finds where knowledge
is and where it is wanted, not what a bridge makes of it.

Axes: I augment layer, J anchor layer, B batch, T position, D anchor width, E features of a tap,
F of the anchor's stream (both with a constant), R of the gradient; F and R are random projections.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax import sharding
from calm_jax.models import Decoder, Inputs
from calm_jax.models.layer import ForwardPass
from calm_jax.models.stack import run_layers
from calm_jax.training.cross_entropy import head_loss

OWN, PROJECTED = 1024, 64  # most features F and R
OWN_PENALTY = 0.01
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge regression, times the mean feature power


@dataclasses.dataclass(frozen=True)
class Gains:
    """What each connection could tell the anchor.

    Attributes:
        explained_IJ: share of the gradient's power that the tap predicts and the stream does not,
            held out; 0 if it is worse than predicting nothing.
        gain_IJ: nats a token by which the loss falls, to first order, for each unit of what is
            added, relative to the stream it is added to.
    """

    explained_IJ: np.ndarray
    gain_IJ: np.ndarray

    def choose(self, count: int) -> tuple[tuple[int, int], ...]:
        """The `count` anchor layers with the largest gain, each with its best tap."""
        best_J = np.argmax(self.gain_IJ, axis=0)
        order = np.argsort(-np.max(self.gain_IJ, axis=0), kind="stable")[:count]
        return tuple((int(best_J[j]), int(j)) for j in sorted(order))

    def table(self, chosen: Sequence[tuple[int, int]] = ()) -> str:
        """The gains in thousandths of a nat, a row for each augment layer; brackets: `chosen`."""
        I, J = self.gain_IJ.shape
        cells = [[f"{1000 * self.gain_IJ[i, j]:.1f}" for j in range(J)] for i in range(I)]
        for i, j in chosen:
            cells[i][j] = f"[{cells[i][j]}]"
        width = 1 + max(len(cell) for row in cells for cell in row)
        numbered = [("", range(J)), *enumerate(cells)]
        return "\n".join(
            f"{name:>5}" + "".join(f"{cell:>{width}}" for cell in row) for name, row in numbered
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Moments:
    """Sums over the tokens of some batches; the leading axis of features is that of layers."""

    features: Any  # features × features
    products: Any  # features × gradients
    gradient_J: Any  # power of the gradient
    stream_J: Any  # power of the stream
    weight: Any  # of the tokens in the loss


def gains(
    anchor: Decoder,
    augment: Decoder,
    batches: Iterable[dict[str, jax.Array]],
    *,
    chunk: int = 0,
) -> Gains:
    """Probes every pair of layers on batches with seqio's decoder keys, [B, T] each.

    Args:
        batches: the first third of them says what the anchor's own stream predicts; each half of
            the others is predicted from the other half.
        chunk: positions whose logits exist at once; 0: all.
    """
    batches = list(batches)
    graphdefs, states = zip(*(nnx.split(model) for model in (anchor, augment)), strict=True)
    projections = _projection(anchor.width, OWN, 0), _projection(anchor.width, PROJECTED, 1)
    third = len(batches) // 3
    own = _summed(
        _own_moments(graphdefs[0], chunk, states[0], projections, batch)
        for batch in batches[:third]
    )
    fitted_JFR = np.stack(
        [
            _Ridge(features_FF).solve(products_FR, OWN_PENALTY)
            for features_FF, products_FR in zip(own.features, own.products, strict=True)
        ]
    ).astype(np.float32)
    halves = [
        _summed(
            _tap_moments(graphdefs, chunk, states, projections, fitted_JFR, batch)
            for batch in batches[first::2]
        )
        for first in (third, third + 1)
    ]
    return _gains(*halves)


def _projection(width: int, most: int, seed: int) -> np.ndarray:
    """A random matrix [width, most] that keeps lengths on average; the identity if it need not."""
    if width <= most:
        return np.eye(width, dtype=np.float32)
    random = np.random.default_rng(seed)
    return (random.normal(size=(width, most)) / most**0.5).astype(np.float32)


def _summed(moments: Iterable[_Moments]) -> _Moments:
    total = functools.reduce(lambda one, other: jax.tree.map(jnp.add, one, other), moments)
    return jax.tree.map(lambda x: sharding.on_host(x).astype(np.float64), total)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _own_moments(graphdef, chunk, state, projections, batch) -> _Moments:
    """What the anchor's own streams say about the gradient after the same layers."""
    own = _gradients(nnx.merge(graphdef, state), batch, chunk, projections)
    with jax.default_matmul_precision("highest"):
        features_JFF = jnp.einsum("jbtf,jbtg->jfg", own.features_JBTF, own.features_JBTF)
        products_JFR = jnp.einsum("jbtf,jbtr->jfr", own.features_JBTF, own.gradient_JBTR)
    return _Moments(features_JFF, products_JFR, None, None, None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tap_moments(graphdefs, chunk, states, projections, fitted_JFR, batch) -> _Moments:
    """What the taps say about that part of the gradient which the own streams do not predict."""
    anchor, augment = map(nnx.merge, graphdefs, states)
    own = _gradients(anchor, batch, chunk, projections)
    layers = tuple(range(augment.depth))
    taps_IBTE = augment.taps(own.inputs, layers)[0].of(layers, stacked=True)
    features_IBTE = _features(taps_IBTE, own.inputs)
    with jax.default_matmul_precision("highest"):
        left_JBTR = own.gradient_JBTR - jnp.einsum("jbtf,jfr->jbtr", own.features_JBTF, fitted_JFR)
        features_IEE = jnp.einsum("ibte,ibtf->ief", features_IBTE, features_IBTE)
        products_IJER = jnp.einsum("ibte,jbtr->ijer", features_IBTE, left_JBTR)
    gradient_J = jnp.sum(jnp.square(own.gradient_JBTR), axis=(1, 2, 3))
    return _Moments(features_IEE, products_IJER, gradient_J, own.stream_J, own.weight)


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The anchor's streams and the loss' gradients after every layer, on one batch."""

    inputs: Inputs
    features_JBTF: jax.Array
    gradient_JBTR: jax.Array
    stream_J: jax.Array
    weight: jax.Array


def _gradients(anchor: Decoder, batch, chunk: int, projections) -> _Gradients:
    inputs = Inputs.of_batch(batch).filled()
    real_BT = inputs.segments_BT != 0
    weights_BT = batch["decoder_loss_weights"] * real_BT
    forward = ForwardPass(anchor.config, anchor.execution, inputs, None)

    def layer(x_BTD, number_and_added):
        number, added_BTD = number_and_added
        x_BTD, _ = run_layers(anchor.layers, x_BTD, forward, first=number, count=1)
        return x_BTD + added_BTD.astype(x_BTD.dtype), jax.lax.stop_gradient(x_BTD)

    def loss(added_JBTD):
        steps = (jnp.arange(anchor.depth), added_JBTD)
        x_BTD, streams_JBTD = jax.lax.scan(layer, anchor.embed(inputs), steps)
        targets_BT = batch["decoder_target_tokens"]
        return head_loss(anchor, x_BTD, targets_BT, weights_BT, chunk)[0], streams_JBTD

    zeros = jnp.zeros((anchor.depth, *inputs.shape, anchor.width), jnp.float32)
    gradient_JBTD, streams_JBTD = jax.grad(loss, has_aux=True)(zeros)
    project_DF, project_DR = projections
    powers_JBT = jnp.sum(jnp.square(streams_JBTD.astype(jnp.float32)), axis=-1)
    return _Gradients(
        inputs,
        _features(streams_JBTD, inputs, project_DF),
        (gradient_JBTD * real_BT[..., None]) @ project_DR,
        jnp.sum(powers_JBT * real_BT, axis=(1, 2)),
        jnp.sum(weights_BT),
    )


def _features(states_LBTD, inputs: Inputs, projection: np.ndarray | None = None) -> jax.Array:
    """Normed states, projected, and a constant, float32 [L, B, T, features]; padding is zero."""
    x = states_LBTD.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    x = x if projection is None else x @ projection
    x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], axis=-1)
    return x * (inputs.segments_BT != 0)[..., None]


class _Ridge:
    """A ridge regression, for several penalties at the cost of one."""

    def __init__(self, features_EE: np.ndarray):
        self._values_E, self.vectors_EE = np.linalg.eigh(features_EE)

    def turned(self, products: np.ndarray, penalty: float) -> np.ndarray:
        """The solution [..., E, R] in the basis of `vectors_EE`."""
        values_E = np.maximum(self._values_E, 0)
        inverse_E = 1 / (values_E + penalty * np.mean(values_E))
        return inverse_E[:, None] * (self.vectors_EE.T @ products)

    def solve(self, products: np.ndarray, penalty: float) -> np.ndarray:
        """The solution [..., E, R]; the penalty is relative to the features' mean power."""
        return self.vectors_EE @ self.turned(products, penalty)


def _gains(one: _Moments, other: _Moments) -> Gains:
    """Fits on each half and predicts the other; each pair takes the penalty that serves it best."""
    I, J = one.products.shape[:2]
    explained_IJ = np.zeros((I, J))
    for i in range(I):
        by_penalty = np.zeros((len(PENALTIES), J))
        for fitted, held in ((one, other), (other, one)):
            ridge = _Ridge(fitted.features[i])
            held_EE = ridge.vectors_EE.T @ held.features[i] @ ridge.vectors_EE
            held_JER = ridge.vectors_EE.T @ held.products[i]
            for number, penalty in enumerate(PENALTIES):
                x_JER = ridge.turned(fitted.products[i], penalty)
                by_penalty[number] += np.sum(x_JER * (2 * held_JER - held_EE @ x_JER), axis=(1, 2))
        explained_IJ[i] = np.maximum(0, by_penalty.max(axis=0))
    power_J, stream_J = one.gradient_J + other.gradient_J, one.stream_J + other.stream_J
    return Gains(
        explained_IJ / np.maximum(power_J, np.finfo(np.float32).tiny),
        np.sqrt(stream_J * explained_IJ) / (one.weight + other.weight),
    )
