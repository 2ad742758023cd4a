"""Tiny random Gemma models of every generation, and their logits by DeepMind's own Flax modules.

Run where the `gemma` package works, which needs versions of JAX that the project does not use:

    pip install gemma==3.3.0 kauldron==1.3.0 jax==0.9.1 typeguard==4.4.4
    python tests/parity/make_gemma_deepmind_golden.py tests/checkpoints/convert/golden

Each `gemma_deepmind_<name>.npz` holds `tokens` [B, T], `logits` [B, T, V], the parameters by their
nested path, `flat` and `stacked`, the names and shapes that the package's own code gives the same
parameters in its two other layouts, and `options`, JSON of what a tree cannot tell.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from gemma import gm
from gemma.gm.ckpts import _checkpoint, _compat

LOCAL = gm.nn.AttentionType.LOCAL_SLIDING
GLOBAL = gm.nn.AttentionType.GLOBAL
BY_WIDTH = gm.nn.config.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
BATCH, LENGTH = 2, 11

SIZES = {"num_embed": 40, "embed_dim": 12, "hidden_dim": 16, "head_dim": 4}
PLAIN = {"use_post_attn_norm": False, "use_post_ffw_norm": False, "final_logit_softcap": None}
POST = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
GEMMA2 = {**POST, "attn_logits_soft_cap": 5.0, "final_logit_softcap": 30.0}
# Layers, what makes the generation, and the attention pattern of the stacked layout.
MODELS = {
    "1_multi_head": (2, {**PLAIN, "num_heads": 4, "num_kv_heads": 4}, (GLOBAL,)),
    "1_multi_query": (2, {**PLAIN, "num_heads": 4, "num_kv_heads": 1}, (GLOBAL,)),
    "2_plain": (
        3,
        {**GEMMA2, "num_heads": 4, "num_kv_heads": 2, "sliding_window_size": 3},
        (LOCAL, GLOBAL),
    ),
    "2_transposed": (
        2,
        {
            **GEMMA2,
            "num_heads": 2,
            "num_kv_heads": 2,
            "sliding_window_size": 4,
            "transpose_gating_einsum": True,
            "query_pre_attn_norm": BY_WIDTH,
        },
        (LOCAL, GLOBAL),
    ),
    "3": (
        7,
        {
            **POST,
            "final_logit_softcap": None,
            "num_heads": 4,
            "num_kv_heads": 2,
            "sliding_window_size": 4,
            "transpose_gating_einsum": True,
            "use_qk_norm": True,
            "query_pre_attn_norm": BY_WIDTH,
            "local_base_frequency": 10_000,
            "global_base_frequency": 1_000_000,
            "global_scale_factor": 8.0,
        },
        (LOCAL,) * 5 + (GLOBAL,),
    ),
}


def main(folder: pathlib.Path) -> None:
    for seed, (name, (num_layers, fields, pattern)) in enumerate(MODELS.items()):
        types = gm.nn.config.make_attention_layers_types(pattern, num_layers=num_layers)
        config = gm.nn.config.TransformerConfig(**SIZES, **fields, attention_types=types)
        model = gm.nn.Transformer(config=config, dtype=jnp.float32)
        rng = np.random.default_rng(seed)
        # Id 0 is padding to the package.
        tokens_BT = rng.integers(3, config.num_embed, (BATCH, LENGTH)).astype(np.int32)
        abstract = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)["params"]
        params = _random(abstract, rng)
        with jax.default_matmul_precision("highest"):
            logits_BTV = model.apply({"params": params}, tokens_BT).logits
        flat = _checkpoint._nested_to_flat(params)
        np.savez_compressed(
            folder / f"gemma_deepmind_{name}.npz",
            tokens=tokens_BT,
            logits=np.asarray(logits_BTV, np.float32),
            flat=_described(flat),
            stacked=_described(_compat.stack_params(flat, len(pattern))),
            options=json.dumps(_options(config)),
            **traverse_util.flatten_dict(params, sep="/"),
        )


def _random(abstract, rng: np.random.Generator):
    """Parameters that hide nothing: norms, too, differ from what they start as."""

    def draw(path, x):
        name = path[-1].key
        std = {"scale": 0.2, "input_embedding": 1.0}.get(name, 0.25)
        return rng.normal(0, std, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def _described(tree) -> str:
    """JSON of name → shape, keys joined by "/"."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    return json.dumps({name: list(np.shape(x)) for name, x in flat.items()})


def _options(config) -> dict:
    """What the tree does not tell, by the names of the conversion's options."""
    found = {"query_scale": config.query_pre_attn_scalar()}
    if config.sliding_window_size:
        found["window"] = config.sliding_window_size
        found["attention_logit_cap"] = config.attn_logits_soft_cap or 0
        found["final_logit_cap"] = config.final_logit_softcap or 0
    if config.use_qk_norm:
        found["rope_factor"] = config.global_scale_factor
    return found


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
