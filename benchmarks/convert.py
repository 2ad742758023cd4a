"""Converting and loading a large checkpoint: its rate against `cp`, and the memory it takes.

  python benchmarks/convert.py [--gigabytes=4] [--folder=/tmp/calm_benchmark] [--output=FILE.json]

Makes random bfloat16 Llama checkpoints in sharded safetensors, copies them, converts
them, and loads the result onto 8 simulated devices, each in a process of its own. FOLDER needs four
times the size and is removed at the end.

A virtual machine gives memory that was free for some two seconds back to its host, and a write to
such memory takes ten times as long. So `cp` and converting alike begin when the other's files were
just removed, and nothing else for a while; and the rate is told of a quarter of the checkpoint too,
which is done within that time.
"""

import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import time

from absl import app, flags
from measuring import Clock, PeakMemory, in_process, tell

GIGABYTES = flags.DEFINE_float("gigabytes", 4.0, "size of the checkpoint")
FOLDER = flags.DEFINE_string("folder", "/tmp/calm_benchmark", "where it is made")
REPEATS = flags.DEFINE_integer("repeats", 5, "of copying and converting, in turns; medians count")
OUTPUT = flags.DEFINE_string("output", None, "JSON file of the results")

WIDTH, MLP, HEADS, KEY_HEADS, HEAD_WIDTH = 2048, 8192, 32, 8, 64
TOKENS = 32_064  # in the vocabulary, for each GB: those of Llama 3 at 4 GB
SETTLE = 5.0  # seconds


def make_checkpoint(folder: pathlib.Path, size: float) -> int:
    """Writes the checkpoint; returns the bytes of its largest tensor."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    layer = {
        "self_attn.q_proj": (HEADS * HEAD_WIDTH, WIDTH),
        "self_attn.k_proj": (KEY_HEADS * HEAD_WIDTH, WIDTH),
        "self_attn.v_proj": (KEY_HEADS * HEAD_WIDTH, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD_WIDTH),
        "mlp.gate_proj": (MLP, WIDTH),
        "mlp.up_proj": (MLP, WIDTH),
        "mlp.down_proj": (WIDTH, MLP),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    tokens = round(size / 1e9 * TOKENS)
    table = 2 * tokens * WIDTH
    layers = round((size - 2 * table) / (2 * sum(map(math.prod, layer.values()))))
    shards = [{"model.embed_tokens": (tokens, WIDTH), "model.norm": (WIDTH,)}]
    shards += [{f"model.layers.{i}.{k}": v for k, v in layer.items()} for i in range(layers)]
    shards += [{"lm_head": (tokens, WIDTH)}]
    random = np.random.default_rng(0)
    file_of = {}
    for number, shapes in enumerate(shards):
        tensors = {
            f"{name}.weight": random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            for name, shape in shapes.items()
        }
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        file_of |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_WIDTH,
        "vocab_size": tokens,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return table


def copy_and_convert(source: str, copy: str, target: str, rounds: int):
    """Seconds of `cp`, seconds of converting and the peak of memory, for each round."""
    # So that imports count for memory, and not for time.
    import calm_jax.checkpoints.convert.conversion

    figures = []
    for _ in range(rounds):
        time.sleep(SETTLE)
        shutil.rmtree(target, ignore_errors=True)
        with Clock() as copying:
            subprocess.run(["cp", "-r", source, copy], check=True)
        time.sleep(SETTLE)
        shutil.rmtree(copy)
        with PeakMemory() as memory, Clock() as converting:
            calm_jax.convert(source, target)
        figures.append((copying.seconds, converting.seconds, memory.peak))
    return figures


def load(folder: str, dtype: str | None):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax
    from flax import nnx

    import calm_jax
    from calm_jax.sharding import make_mesh

    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    jax.device_put(0).block_until_ready()
    with PeakMemory() as memory, Clock() as clock:
        decoder = calm_jax.load(folder, mesh=mesh, dtype=dtype)
        leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(decoder)))
    held = {device: 0 for device in jax.devices()}
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    whole = sum(leaf.nbytes for leaf in leaves)
    return clock.seconds, memory.peak, memory.before, whole, max(held.values())


def main(_) -> None:
    folder = pathlib.Path(FOLDER.value)
    if folder.exists():
        raise app.UsageError(f"--folder={folder} exists; it would be removed at the end")
    source, part, copy, target = (folder / n for n in ("source", "part", "copy", "converted"))
    source.mkdir(parents=True)
    part.mkdir()
    largest = make_checkpoint(source, GIGABYTES.value * 1e9)
    make_checkpoint(part, GIGABYTES.value * 1e9 / 4)
    rows = [("what", "figure", "bound")]
    rows.append(("largest tensor, GB", round(largest / 1e9, 3), ""))
    for what in (part, source):
        # The first round warms the system's cache of files.
        rounds = in_process(copy_and_convert, str(what), str(copy), str(target), 1 + REPEATS.value)
        copying, converting, peaks = zip(*rounds, strict=True)
        size = sum(path.stat().st_size for path in what.iterdir()) / 1e9
        cp, ours = statistics.median(copying[1:]), statistics.median(converting[1:])
        name = f"{size:.2f} GB"
        rows.append((f"{name}: cp, GB/s", round(size / cp, 2), ""))
        rows.append((f"{name}: convert, GB/s", round(size / ours, 2), ""))
        rows.append((f"{name}: rate of convert / cp", round(cp / ours, 2), ">= 0.5"))
    bound = 2.5 * largest + 1e9
    rows.append(("convert: peak memory, GB", round(max(peaks) / 1e9, 2), f"<= {bound / 1e9:.2f}"))
    for dtype in (None, "int8", "int4"):
        seconds, peak, before, whole, most = in_process(load, str(target), dtype)
        name = f"load as {dtype or 'stored'}, 8 devices"
        rows.append((f"{name}: GB/s", round(whole / seconds / 1e9, 2), ""))
        rows.append((f"{name}: model, GB", round(whole / 1e9, 2), ""))
        rows.append((f"{name}: most on a device / model", round(most / whole, 3), ""))
        bound = "<= 1.3" if dtype is None else ""
        rows.append((f"{name}: peak memory / model", round(peak / whole, 2), bound))
        rows.append((f"{name}: of it before loading, GB", round(before / 1e9, 2), ""))
    tell("convert", rows, OUTPUT.value)
    shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
