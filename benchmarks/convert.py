"""Converting and loading a large checkpoint: its rate against `cp`, and the memory it takes.

  python benchmarks/convert.py [--gigabytes=4] [--folder=/tmp/calm_benchmark] [--output=FILE.json]

Makes a random bfloat16 checkpoint of Llama's form in sharded safetensors, copies it, converts it,
and loads the result onto 8 simulated devices, each in a process of its own. FOLDER needs four times
the size and is removed at the end.
"""

import json
import math
import multiprocessing
import os
import pathlib
import shutil
import statistics
import subprocess

from absl import app, flags
from measuring import Clock, PeakMemory, tell

GIGABYTES = flags.DEFINE_float("gigabytes", 4.0, "size of the checkpoint")
FOLDER = flags.DEFINE_string("folder", "/tmp/calm_benchmark", "where it is made")
REPEATS = flags.DEFINE_integer("repeats", 3, "of copying and converting, in turns; medians count")
OUTPUT = flags.DEFINE_string("output", None, "JSON file of the results")

WIDTH, MLP, HEADS, KEY_HEADS, HEAD_WIDTH, VOCABULARY = 2048, 8192, 32, 8, 64, 128_256


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
    table = 2 * VOCABULARY * WIDTH
    layers = round((size - 2 * table) / (2 * sum(map(math.prod, layer.values()))))
    shards = [{"model.embed_tokens": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}]
    shards += [{f"model.layers.{i}.{k}": v for k, v in layer.items()} for i in range(layers)]
    shards += [{"lm_head": (VOCABULARY, WIDTH)}]
    random = np.random.default_rng(0)
    places = {}
    for number, shapes in enumerate(shards):
        tensors = {
            f"{name}.weight": random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            for name, shape in shapes.items()
        }
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_WIDTH,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return table


def convert(source: str, target: str, results) -> None:
    import calm_jax
    from calm_jax.checkpoints.convert.registry import families

    families()  # so that imports count for memory, and not for time
    with PeakMemory() as memory, Clock() as clock:
        calm_jax.convert(source, target)
    results.put((clock.seconds, memory.peak, memory.before))


def load(folder: str, dtype: str | None, results) -> None:
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
    results.put((clock.seconds, memory.peak, memory.before, whole, max(held.values())))


def in_process(function, *arguments):
    """The result of a function that puts it into a queue, run in a new process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    result = results.get()
    process.join()
    return result


def main(_) -> None:
    folder = pathlib.Path(FOLDER.value)
    source, copy, target = folder / "source", folder / "copy", folder / "converted"
    shutil.rmtree(folder, ignore_errors=True)
    source.mkdir(parents=True)
    largest = make_checkpoint(source, GIGABYTES.value * 1e9)
    size = sum(path.stat().st_size for path in source.iterdir())
    copying, converting, peaks = [], [], []
    for _ in range(REPEATS.value):
        for place in (copy, target):
            shutil.rmtree(place, ignore_errors=True)
        with Clock() as clock:
            subprocess.run(["cp", "-r", source, copy], check=True)
        copying.append(clock.seconds)
        seconds, peak, _ = in_process(convert, str(source), str(target))
        converting.append(seconds)
        peaks.append(peak)
    cp, ours = statistics.median(copying), statistics.median(converting)
    rows = [("what", "figure", "bound")]
    rows.append(("checkpoint, GB", round(size / 1e9, 2), ""))
    rows.append(("largest tensor, GB", round(largest / 1e9, 3), ""))
    rows.append(("cp, GB/s", round(size / cp / 1e9, 2), ""))
    rows.append(("convert, GB/s", round(size / ours / 1e9, 2), ""))
    rows.append(("rate of convert / cp", round(cp / ours, 2), ">= 0.5"))
    bound = 2.5 * largest + 1e9
    rows.append(("convert: peak memory, GB", round(max(peaks) / 1e9, 2), f"<= {bound / 1e9:.2f}"))
    for dtype in (None, "int8"):
        seconds, peak, before, whole, most = in_process(load, str(target), dtype)
        name = f"load as {dtype or 'stored'}, 8 devices"
        rows.append((f"{name}: GB/s", round(whole / seconds / 1e9, 2), ""))
        rows.append((f"{name}: model, GB", round(whole / 1e9, 2), ""))
        rows.append((f"{name}: most on a device / model", round(most / whole, 3), ""))
        rows.append((f"{name}: peak memory / model", round(peak / whole, 2), "<= 1.3"))
        rows.append((f"{name}: of it before loading, GB", round(before / 1e9, 2), ""))
    tell("convert", rows, OUTPUT.value)
    shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
