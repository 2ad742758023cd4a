"""The pair of `pair.py` and its bridge in plain PyTorch, in a careful and in a naive version.

Careful: scaled-dot-product attention, the augment without gradients and up to its last tap,
gradients of no frozen weight, and so nothing of the anchor below its first connection in the graph.
Naive: what public implementations do. Every weight keeps `requires_grad`, the whole augment runs
with its head and inside the graph, attention is written out. Both have the same causal mask.

Axes: B batch, T position, D model width, N heads, K key heads, H head width.
"""

from collections.abc import Iterator

import jax
import numpy as np
import torch
import torch.nn.functional as F
from pair import Pair
from torch import Tensor, nn

from calm_jax.models import ComposedDecoder, CompositionConfig, Decoder, DecoderConfig
from calm_jax.models.config import heads
from calm_jax.models.cross_attention import NORM_EPS
from calm_jax.models.parameters import Tree, module_tree, path_name


class Layer(nn.Module):
    """One Llama layer; matrices are [out, in], as `F.linear` wants them."""

    def __init__(self, config: DecoderConfig, **options):
        super().__init__()
        D, H, F_ = config.embed_dim, config.head_dim, config.mlp_dim
        N, K, branch = config.num_heads, config.num_kv_heads, (2 * config.num_layers) ** -0.5
        self.config = config
        self.query = _matrix(N * H, D, **options)
        self.key = _matrix(K * H, D, **options)
        self.value = _matrix(K * H, D, **options)
        self.output = _matrix(D, N * H, scale=branch, **options)
        self.gate, self.up = _matrix(F_, D, **options), _matrix(F_, D, **options)
        self.down = _matrix(D, F_, scale=branch, **options)
        self.attention_norm = nn.Parameter(torch.ones(D, **options))
        self.mlp_norm = nn.Parameter(torch.ones(D, **options))

    def forward(self, x_BTD: Tensor, turn: tuple[Tensor, Tensor], naive: bool) -> Tensor:
        H, eps = self.config.head_dim, self.config.norm_eps
        normed_BTD = _rms_norm(x_BTD, self.attention_norm, eps)
        q_BNTH = _rotate(_split(F.linear(normed_BTD, self.query), H), turn)
        k_BKTH = _rotate(_split(F.linear(normed_BTD, self.key), H), turn)
        v_BKTH = _split(F.linear(normed_BTD, self.value), H)
        x_BTD = x_BTD + F.linear(_attention(q_BNTH, k_BKTH, v_BKTH, naive), self.output)
        normed_BTD = _rms_norm(x_BTD, self.mlp_norm, eps)
        hidden = F.silu(F.linear(normed_BTD, self.gate)) * F.linear(normed_BTD, self.up)
        return x_BTD + F.linear(hidden, self.down)


class Model(nn.Module):
    """A decoder with a head of its own."""

    def __init__(self, config: DecoderConfig, device: str):
        super().__init__()
        options = {"device": device, "dtype": getattr(torch, config.dtype)}
        self.config = config
        self.embedding = _matrix(config.vocab_size, config.embed_dim, std=1.0, **options)
        self.layers = nn.ModuleList(Layer(config, **options) for _ in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.ones(config.embed_dim, **options))
        self.head = _matrix(config.vocab_size, config.embed_dim, **options)

    def logits(self, x_BTD: Tensor) -> Tensor:
        return F.linear(_rms_norm(x_BTD, self.final_norm, self.config.norm_eps), self.head).float()

    def turn(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary angles, float32 [T, H / 2]."""
        H = self.config.head_dim
        device = self.embedding.device
        steps = torch.arange(0, H, 2, device=device, dtype=torch.float32) / H
        angles = torch.arange(length, device=device)[:, None] * self.config.rope_base**-steps
        return angles.cos(), angles.sin()


class Crossing(nn.Module):
    """f_proj and f_cross of one connection, with norms; stored in float32."""

    def __init__(self, config: CompositionConfig, anchor: DecoderConfig, augment_dim: int, device):
        super().__init__()
        D, E, (N, H) = anchor.embed_dim, augment_dim, heads(config, anchor)
        options = {"device": device, "dtype": torch.float32}
        self.head_dim = H
        self.projection = _matrix(D, E, **options)
        self.query, self.key, self.value = (_matrix(N * H, D, **options) for _ in range(3))
        self.output = _matrix(D, N * H, **options)
        self.query_norm = nn.Parameter(torch.ones(D, **options))
        self.tap_norm = nn.Parameter(torch.ones(E, **options))

    def forward(self, h_BTD: Tensor, tap_BTE: Tensor, naive: bool) -> Tensor:
        def linear(x, weight):
            return F.linear(x, weight.to(h_BTD.dtype))

        projected = linear(_rms_norm(tap_BTE, self.tap_norm, NORM_EPS), self.projection)
        query = linear(_rms_norm(h_BTD, self.query_norm, NORM_EPS), self.query)
        key, value = linear(projected, self.key), linear(projected, self.value)
        split = (_split(x, self.head_dim) for x in (query, key, value))
        return linear(_attention(*split, naive), self.output)


class Composed(nn.Module):
    """The composed model; `forward` is the mean loss of a batch."""

    def __init__(self, pair: Pair, device: str, *, naive: bool):
        super().__init__()
        self.naive = naive
        self.anchor = Model(pair.anchor, device)
        self.augment = Model(pair.augment, device)
        self.connections = pair.composition.resolve(pair.augment.num_layers, pair.anchor.num_layers)
        self.bridge = nn.ModuleList(
            Crossing(pair.composition, pair.anchor, pair.augment.embed_dim, device)
            for _ in self.connections
        )
        for frozen in (self.anchor, self.augment):
            frozen.requires_grad_(naive)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        if self.naive:
            taps = self._taps(tokens_BT)
        else:
            with torch.no_grad():
                taps = self._taps(tokens_BT)
        at_layer = {j: (k, i) for k, (i, j) in enumerate(self.connections)}
        x_BTD = F.embedding(tokens_BT, self.anchor.embedding)
        turn = self.anchor.turn(tokens_BT.shape[1])
        for j, layer in enumerate(self.anchor.layers):
            x_BTD = layer(x_BTD, turn, self.naive)
            if j in at_layer:
                k, i = at_layer[j]
                x_BTD = x_BTD + self.bridge[k](x_BTD, taps[i], self.naive)
        logits_BTV = self.anchor.logits(x_BTD)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def _taps(self, tokens_BT: Tensor) -> list[Tensor]:
        """The output of each layer of the augment, as far as this version runs it."""
        taps, x_BTE = [], F.embedding(tokens_BT, self.augment.embedding)
        turn = self.augment.turn(tokens_BT.shape[1])
        last = len(self.augment.layers) if self.naive else self.connections[-1][0] + 1
        for layer in self.augment.layers[:last]:
            x_BTE = layer(x_BTE, turn, self.naive)
            taps.append(x_BTE)
        if self.naive:
            self.augment.logits(x_BTE)
        return taps


class Trainer:
    """The same step as calm_jax's: clipped gradients of the bridge, AdamW."""

    def __init__(
        self, model: Composed, learning_rate: float, *, compiled: bool, micro_batches: int = 1
    ):
        self.model, self.micro_batches = model, micro_batches
        self.loss = torch.compile(model) if compiled else model
        on_gpu = model.anchor.embedding.is_cuda
        self.optimizer = torch.optim.AdamW(
            model.bridge.parameters(), lr=learning_rate, weight_decay=0.0, fused=on_gpu
        )

    def step(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[float, float]:
        """The loss and the norm of its gradient, before clipping."""
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=tokens_BT.device)
        for tokens, targets in _micro_batches(tokens_BT, targets_BT, self.micro_batches):
            loss = self.loss(tokens, targets) / self.micro_batches
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.bridge.parameters(), 1.0)
        self.optimizer.step()
        return total.item(), norm.item()


def copy_weights(composed: ComposedDecoder, model: Composed) -> None:
    """Gives `model` the weights of calm_jax's model of the same pair."""
    for ours, theirs in ((composed.anchor, model.anchor), (composed.augments[0], model.augment)):
        with torch.no_grad():
            theirs.embedding.copy_(_tensor(ours.embedding[...]))
        _fill(theirs, {"final_norm": ours.final_norm.scale[...], "head": ours.head[...]})
        for layer, arrays in zip(theirs.layers, _layers(ours), strict=True):
            _fill(layer, arrays)
    rounds = module_tree(composed.bridge)["rounds"]
    crossings = [
        crossing
        for number, round_ in enumerate(composed.plan.rounds)
        for crossing in _unstacked(rounds[str(number)]["0"], 1 if round_.stacked else 0)
    ]
    for crossing, arrays in zip(model.bridge, crossings, strict=True):
        _fill(crossing, arrays)


def _layers(decoder: Decoder) -> list[dict[str, np.ndarray]]:
    """The arrays of each layer, by name."""
    return _unstacked(module_tree(decoder.layers), 1)


def _unstacked(tree: Tree, leading: int) -> list[dict[str, np.ndarray]]:
    """Arrays by the last of their names, for each index along the `leading` dimensions."""
    arrays = {
        path_name(path).removesuffix("/scale").rsplit("/")[-1]: np.asarray(x).reshape(
            -1, *x.shape[leading:]
        )
        for path, x in jax.tree.leaves_with_path(tree)
    }
    count = len(next(iter(arrays.values())))
    return [{name: x[index] for name, x in arrays.items()} for index in range(count)]


def _fill(module: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Matrices are [in..., out...] there and [out, in] here."""
    with torch.no_grad():
        for name, x in arrays.items():
            x, parameter = np.asarray(x), getattr(module, name)
            x = x.reshape(parameter.shape[1], -1).T if x.ndim > 1 else x
            parameter.copy_(_tensor(x))


def _tensor(x) -> Tensor:
    return torch.as_tensor(np.array(x))


def _micro_batches(
    tokens: Tensor, targets: Tensor, micro_batches: int
) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True)


def _matrix(rows: int, columns: int, *, scale: float = 1.0, std: float | None = None, **options):
    """N(0, 1/columns) times `scale`, or N(0, std²)."""
    std = scale * columns**-0.5 if std is None else std
    return nn.Parameter(torch.empty(rows, columns, **options).normal_(std=std))


def _rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * scale.float()).to(x.dtype)


def _split(x_BTD: Tensor, head_dim: int) -> Tensor:
    """[B, T, N·H] as [B, N, T, H]."""
    return x_BTD.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(x_BNTH: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    (cos, sin), (first, second) = turn, x_BNTH.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BNTH.dtype)


def _attention(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, naive: bool) -> Tensor:
    """Causal attention with grouped queries, [B, T, N·H]."""
    if not naive:
        x_BNTH = F.scaled_dot_product_attention(
            q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=q_BNTH.shape[1] != k_BKTH.shape[1]
        )
    else:
        queries_a_key = q_BNTH.shape[1] // k_BKTH.shape[1]
        k_BNTH = k_BKTH.repeat_interleave(queries_a_key, dim=1)
        v_BNTH = v_BKTH.repeat_interleave(queries_a_key, dim=1)
        logits = q_BNTH @ k_BNTH.transpose(-1, -2) * q_BNTH.shape[-1] ** -0.5
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
        x_BNTH = F.softmax(logits, dim=-1, dtype=torch.float32).to(v_BNTH.dtype) @ v_BNTH
    return x_BNTH.transpose(1, 2).flatten(-2)
