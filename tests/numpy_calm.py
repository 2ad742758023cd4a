"""CALM and its decoders in plain numpy: float64, loops over rows, queries and heads.

Written from the definitions, not from the library: it shares no code with `calm_jax` and only reads
a module's arrays by their names. Connections are (augment, augment layer, anchor layer) triples.
"""

import math

import numpy as np


def decoder_logits(config, tree, tokens_BT, positions_BT, segments_BT):
    """Logits [B, T, V] of one decoder."""
    hidden = [
        residual_streams(config, tree, *row)[-1]
        for row in zip(tokens_BT, positions_BT, segments_BT, strict=True)
    ]
    return np.stack([head(config, tree, x_TD) for x_TD in hidden])


def composed_logits(
    anchor, augments, bridge, configs, tokens_BT, positions_BT, segments_BT, prompt_BT
):
    """Logits [B, T, V] of a composed model, and what each connection saw and gave.

    Args:
        anchor: (config, tree).
        augments: a list of (config, tree).
        bridge: {connection: its parameters by name}.
        configs: one composition config an augment.

    Returns:
        the logits, and {connection: {"weights": [B, N, T, S], "y": [B, T, D], "h": [B, T, D]}}.
    """
    config, tree = anchor
    logits, seen = [], {c: {"weights": [], "y": [], "h": []} for c in bridge}
    for row in zip(tokens_BT, positions_BT, segments_BT, prompt_BT, strict=True):
        tokens, positions, segments, _ = row
        taps = [residual_streams(*augment, tokens, positions, segments) for augment in augments]

        def bridged(layer, h_TD, taps=taps, row=row):
            total_TD = h_TD
            for connection, parameters in bridge.items():
                number, tap, anchor_layer = connection
                if anchor_layer == layer:
                    y_TD, weights_NTS = cross_attention(
                        configs[number], parameters, h_TD, taps[number][tap], *row[1:]
                    )
                    total_TD = total_TD + y_TD
                    for key, value in {"weights": weights_NTS, "y": y_TD, "h": h_TD}.items():
                        seen[connection][key].append(value)
            return total_TD

        x_TD = residual_streams(config, tree, tokens, positions, segments, bridged)[-1]
        logits.append(head(config, tree, x_TD))
    stacked = {c: {key: np.stack(rows) for key, rows in found.items()} for c, found in seen.items()}
    return np.stack(logits), stacked


def residual_streams(config, tree, tokens, positions, segments, after=lambda layer, x_TD: x_TD):
    """The residual stream after each layer (and after `after`), a list of [T, D], of one row."""
    x_TD = f64(tree["embedding"])[tokens] * config.embed_scale
    outputs = []
    for layer, p in enumerate(layers_of(tree)):
        local = bool(config.window) and config.window_pattern[layer % len(config.window_pattern)]
        y_TD = np.stack([norm(config, p["attention_norm"], x) for x in x_TD])
        a_TD = self_attention(config, p["attention"], y_TD, positions, segments, local)
        if config.post_norms:
            a_TD = np.stack([norm(config, p["post_attention_norm"], a) for a in a_TD])
        if config.block == "parallel":
            x_TD = x_TD + a_TD + np.stack([mlp(config, p["mlp"], y) for y in y_TD])
        else:
            x_TD = x_TD + a_TD
            m_TD = np.stack([mlp(config, p["mlp"], norm(config, p["mlp_norm"], x)) for x in x_TD])
            if config.post_norms:
                m_TD = np.stack([norm(config, p["post_mlp_norm"], m) for m in m_TD])
            x_TD = x_TD + m_TD
        x_TD = after(layer, x_TD)
        outputs.append(x_TD)
    return outputs


def head(config, tree, x_TD):
    """Final norm and language model head."""
    x_TD = np.stack([norm(config, tree["final_norm"], x) for x in x_TD])
    table_DV = f64(tree["embedding"]).T if config.tied_head else f64(tree["head"])
    logits_TV = x_TD @ table_DV * config.logit_scale
    if config.head_bias:
        logits_TV = logits_TV + f64(tree["head_bias"])
    return soft_cap(logits_TV, config.final_logit_cap)


def self_attention(config, p, x_TD, positions, segments, local):
    """Causal self-attention of one row, a query head n reading key head n // (N / K)."""
    T, N, K, H = len(x_TD), config.num_heads, config.num_kv_heads, config.head_dim
    base = config.rope_base
    scaling = config.rope_scaling
    if local and config.local_rope_base is not None:
        base, scaling = config.local_rope_base, None

    def headed(name, heads, position):
        vectors = np.einsum("d,dnh->nh", x_TD[position], f64(p[name]))
        if config.attention_bias:
            vectors = vectors + f64(p[f"{name}_bias"])
        if name == "value":
            return vectors
        if config.qk_norm == "rms":
            vectors = np.stack([norm(config, p[f"{name}_norm"], v) for v in vectors])
        elif config.qk_norm == "l2":
            vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
            vectors = vectors * f64(p[f"{name}_norm"])
        if config.rope:
            rotated = H if config.rope_dim is None else config.rope_dim
            turn = (positions[position], rotated, base, scaling, config.rope)
            vectors = np.stack([rotate(v, *turn) for v in vectors])
        if config.xpos_scale_base is not None:
            decay = (2 * np.arange(H // 2) + 0.4 * H) / (1.4 * H)
            power = positions[position] / config.xpos_scale_base
            factor = np.concatenate([decay, decay]) ** (power if name == "query" else -power)
            vectors = vectors * factor
        return vectors

    queries = [headed("query", N, t) for t in range(T)]
    keys = [headed("key", K, t) for t in range(T)]
    values = [headed("value", K, t) for t in range(T)]
    scale = 1 / math.sqrt(H) if config.query_scale is None else config.query_scale
    result_TD = np.zeros_like(x_TD)
    for t in range(T):
        visible = [s for s in range(t + 1) if segments[s] == segments[t] != 0]
        if local:
            visible = [s for s in visible if s > t - config.window]
        attended_NH = np.zeros((N, H))
        for n in range(N if visible else 0):
            k = n // (N // K)
            scores = np.array([scale * queries[t][n] @ keys[s][k] for s in visible])
            weights = softmax(soft_cap(scores, config.attention_logit_cap))
            attended_NH[n] = sum(w * values[s][k] for w, s in zip(weights, visible, strict=True))
        result_TD[t] = np.einsum("nh,nhd->d", attended_NH, f64(p["output"]))
        if config.output_bias:
            result_TD[t] += f64(p["output_bias"])
    return result_TD


def cross_attention(config, p, h_TD, tap_SE, positions, segments, prompt):
    """f_cross(f_proj(tap), h) of one row [T, D], and its weights [N, T, S]."""
    T, D = h_TD.shape
    _, N, H = p["query"].shape

    def normed(x, name):
        return x / np.sqrt(np.mean(x * x) + 1e-6) * f64(p[name]) if config.norms else x

    def bias(name):
        return f64(p[name]) if config.bias else 0.0

    projected = [
        normed(tap, "tap_norm") @ f64(p["projection"]) + bias("projection_bias") for tap in tap_SE
    ]
    y_TD, weights_NTS = np.zeros((T, D)), np.zeros((N, T, T))
    for t in range(T):
        visible = [s for s in range(t + 1) if segments[s] == segments[t] != 0]
        if config.encoder_only:
            visible = [s for s in visible if prompt[s] == 1]
        if not visible:
            continue
        h = normed(h_TD[t], "query_norm")
        attended_NH = np.zeros((N, H))
        for n in range(N):
            query = h @ f64(p["query"])[:, n] + (f64(p["query_bias"])[n] if config.bias else 0.0)
            scores = []
            for s in visible:
                key = projected[s] @ f64(p["key"])[:, n]
                if config.rotary:
                    key = rotate(key, positions[s], H, 10_000.0, None, "half")
                    turned = rotate(query, positions[t], H, 10_000.0, None, "half")
                    scores.append(turned @ key / math.sqrt(H))
                else:
                    scores.append(query @ key / math.sqrt(H))
            for s, weight in zip(visible, softmax(np.array(scores)), strict=True):
                value = projected[s] @ f64(p["value"])[:, n]
                value = value + (f64(p["value_bias"])[n] if config.bias else 0.0)
                attended_NH[n] += weight * value
                weights_NTS[n, t, s] = weight
        if config.output_projection:
            y_TD[t] = np.einsum("nh,nhd->d", attended_NH, f64(p["output"])) + bias("output_bias")
        else:
            y_TD[t] = attended_NH.reshape(D)
        if config.gate:
            y_TD[t] *= f64(p["gate"])
    return y_TD, weights_NTS


def mlp(config, p, x):
    """Gated or plain MLP of one vector."""

    def bias(name):
        return f64(p[name]) if config.mlp_bias else 0.0

    hidden = x @ f64(p["up"]) + bias("up_bias")
    if config.gated_mlp:
        hidden = hidden * activation(config.activation, x @ f64(p["gate"]) + bias("gate_bias"))
    else:
        hidden = activation(config.activation, hidden)
    return hidden @ f64(p["down"]) + bias("down_bias")


def activation(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def norm(config, p, x):
    """RMSNorm or LayerNorm of one vector."""
    centre = np.mean(x) if config.norm == "layer" else 0.0
    x = x - centre
    x = x / np.sqrt(np.mean(x * x) + config.norm_eps) * (f64(p["scale"]) + config.norm_offset)
    return x + f64(p["bias"]) if config.norm_bias else x


def rotate(x, position, rotated, base, scaling, style):
    """Rotary position of one head's vector: feature pairs as complex numbers."""
    x = x.copy()
    half = rotated // 2
    for r in range(half):
        frequency = scaled(base ** (-2 * r / rotated), scaling)
        first, second = (r, r + half) if style == "half" else (2 * r, 2 * r + 1)
        turned = complex(x[first], x[second]) * np.exp(1j * position * frequency)
        x[first], x[second] = turned.real, turned.imag
    return x


def scaled(frequency, scaling):
    """A rotary frequency, stretched: linear (Gemma 3), or by wavelength (Llama 3.1)."""
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    longest = scaling.original_length / scaling.low_frequency_factor
    shortest = scaling.original_length / scaling.high_frequency_factor
    if wavelength > longest:
        return frequency / scaling.factor
    if wavelength < shortest:
        return frequency
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = (scaling.original_length / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def soft_cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def layers_of(tree):
    """Each layer's parameters, in order."""
    depth = len(tree["layers"]["attention_norm"]["scale"])
    return [pick(tree["layers"], layer) for layer in range(depth)]


def pick(tree, index):
    """One layer of a tree of stacked arrays."""
    if isinstance(tree, dict):
        return {key: pick(value, index) for key, value in tree.items()}
    return np.asarray(tree)[index]


def f64(x):
    return np.asarray(x, np.float64)
