"""The whole road from a published checkpoint to a frozen folder and back, on a tiny Llama."""

import gc
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import torch_files
from converting import decoder_in_memory
from etils import epath
from safetensors.numpy import load_file, save_file
from tiny_models import stored_bytes

import calm_jax
from calm_jax.__main__ import main
from calm_jax.checkpoints import chunks, files
from calm_jax.checkpoints.convert import conversion, verification
from calm_jax.checkpoints.convert.registry import FAMILIES
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.checkpoints.sources.source import Source
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import Decoder

V, D, N, K, H, F, L = 40, 16, 4, 2, 8, 24, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 7,
}
LAYER = {
    "input_layernorm": (D,),
    "post_attention_layernorm": (D,),
    "self_attn.q_proj": (N * H, D),
    "self_attn.k_proj": (K * H, D),
    "self_attn.v_proj": (K * H, D),
    "self_attn.o_proj": (D, N * H),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
}


def random_tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    shapes |= {f"model.layers.{i}.{k}": v for i in range(L) for k, v in LAYER.items()}
    random = np.random.default_rng(0)
    return {f"{k}.weight": random.normal(size=v).astype(dtype) for k, v in shapes.items()}


def save_source(folder, tensors, config=CONFIG):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("sources") / "llama", random_tensors())


def nothing_in(folder) -> bool:
    return not list(folder.iterdir())


def test_the_folder_holds_what_the_source_does(source, tmp_path):
    calm_jax.convert(source, tmp_path / "model")
    decoder = calm_jax.load(tmp_path / "model")
    expected = decoder_in_memory(FAMILIES["llama"], open_source(source))
    assert stored_bytes(decoder) == stored_bytes(expected)
    assert decoder.config == expected.config


def test_chunks_smaller_than_a_layer(source, tmp_path, chunks_of):
    calm_jax.convert(source, tmp_path / "model")
    with chunks_of(100):
        calm_jax.convert(source, tmp_path / "small")
        other = calm_jax.load(tmp_path / "small")
    one = calm_jax.load(tmp_path / "model")
    assert stored_bytes(one) == stored_bytes(other)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_is_the_same_to_the_bit(tmp_path, dtype):
    tensors = random_tensors(dtype)
    save_source(tmp_path / "source", tensors)
    calm_jax.convert(tmp_path / "source", tmp_path / "model")
    stored = "bfloat16" if dtype is ml_dtypes.bfloat16 else "float32"
    assert calm_jax.load(tmp_path / "model").config.dtype == stored
    shutil.rmtree(tmp_path / "source")  # the folder needs it no more
    calm_jax.export(tmp_path / "model", tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].tobytes() == tensor.tobytes(), name
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["dtype"] == np.dtype(dtype).name
    assert config["bos_token_id"] == 7  # what we do not read goes along


def test_several_dtypes_are_kept_apart(tmp_path, caplog):
    tensors = random_tensors(ml_dtypes.bfloat16)
    tensors["model.norm.weight"] = random_tensors()["model.norm.weight"]
    save_source(tmp_path / "source", tensors)
    with caplog.at_level(logging.WARNING, "absl"):
        calm_jax.convert(tmp_path / "source", tmp_path / "model")
        (tmp_path / "source" / "vocab.txt").touch()
        calm_jax.convert(tmp_path / "source", tmp_path / "slow")
    assert "bfloat16 (29 tensors), float32 (1 tensors): stored as float32" in caplog.text
    assert "is converted without a vocabulary: it has no tokenizer file" in caplog.text
    assert "vocab.txt is not one; AutoTokenizer of transformers" in caplog.text
    calm_jax.export(tmp_path / "model", tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "model.safetensors")
    assert {k: v.tobytes() for k, v in found.items()} == {
        k: v.tobytes() for k, v in tensors.items()
    }


def test_exported_in_several_files(source, tmp_path, monkeypatch):
    from calm_jax.checkpoints.convert import export

    monkeypatch.setattr(export, "SHARD_BYTES", 4000)
    calm_jax.convert(source, tmp_path / "model")
    calm_jax.export(tmp_path / "model", tmp_path / "exported")
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 3
    calm_jax.convert(tmp_path / "exported", tmp_path / "again")
    fingerprints = {calm_jax.load(tmp_path / name).fingerprint for name in ("model", "again")}
    assert len(fingerprints) == 1


def test_a_model_trained_here_is_exported_as_the_family_that_computes_it(tmp_path):
    import tiny_models

    decoder = tiny_models.decoder(family="llama", qk_norm="rms", vocab_size=300)
    vocabulary = load_vocabulary("bytes")
    calm_jax.save_frozen(decoder, tmp_path / "model", vocabulary=vocabulary)
    calm_jax.export(tmp_path / "model", tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    ends = {"bos_token_id": None, "eos_token_id": vocabulary.eos_id}
    assert ends.items() <= config.items()
    calm_jax.convert(tmp_path / "exported", tmp_path / "again")
    assert stored_bytes(calm_jax.load(tmp_path / "again")) == stored_bytes(decoder)


def test_a_model_that_no_family_computes_is_not_exported(tmp_path):
    import tiny_models

    calm_jax.save_frozen(tiny_models.decoder(family="palm"), tmp_path / "model")
    message = r"; the model has block 'parallel', llama has block 'sequential'"
    with pytest.raises(
        CalmError, match=rf"none of llama, .* computes the same as this model{message}"
    ):
        calm_jax.export(tmp_path / "model", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_rounded_to_bfloat16(source, tmp_path):
    calm_jax.convert(source, tmp_path / "model", dtype="bfloat16")
    decoder = calm_jax.load(tmp_path / "model")
    expected = decoder_in_memory(FAMILIES["llama"], open_source(source), dtype="bfloat16")
    assert stored_bytes(decoder) == stored_bytes(expected)


def test_every_tensor_is_read_once_and_none_is_kept(source, tmp_path, monkeypatch):
    opened = open_source(source)
    references, read, most = [], [], []

    class Array(np.ndarray):
        """A tensor on the host; plain arrays take no weak references."""

    class Spy:
        def __init__(self, name):
            self.name, self.tensor = name, opened.tensors[name]
            self.shape, self.dtype = self.tensor.shape, self.tensor.dtype

        def __getitem__(self, index):
            gc.collect()
            most.append(sum(reference() is not None for reference in references))
            read.append(self.name)
            array = np.array(self.tensor[index]).view(Array)
            references.append(weakref.ref(array))
            return array

    spied = Source(opened.path, opened.kind, {k: Spy(k) for k in opened.tensors}, opened.config)
    monkeypatch.setattr(conversion, "open_source", lambda _: spied)
    monkeypatch.setattr(chunks, "WRITE_THREADS", 2)
    gc.freeze()  # what exists already need not be searched at every read
    try:
        calm_jax.convert(source, tmp_path / "model")
    finally:
        gc.unfreeze()
    assert sorted(read) == sorted(opened.tensors)
    # Tensors here are of a single chunk: as many as the queue of chunks may wait to be written.
    assert max(most) <= 2 * 2 + 1


@pytest.mark.parametrize(
    "path", ["https://huggingface.co/a/b", "hf://a/b", "s3://bucket/a", "file:///a"]
)
def test_paths_on_neither_a_disk_nor_a_bucket(path, source, tmp_path):
    for call in (
        lambda: calm_jax.convert(path, tmp_path / "model"),
        lambda: calm_jax.convert(source, path),
        lambda: calm_jax.load(path),
    ):
        with pytest.raises(CalmError, match=f"^{path} is neither on a disk nor in a gs:// bucket"):
            call()
    assert nothing_in(tmp_path)


def test_a_bucket_that_does_not_answer(source, tmp_path, monkeypatch):
    path_type = type(epath.Path("gs://bucket"))

    def refuse_buckets(name):
        from_disk = getattr(path_type, name)

        def method(self, *arguments):
            if files.is_bucket(self):
                raise tf.errors.PermissionDeniedError(None, None, "no access\nfor a, b, c")
            return from_disk(self, *arguments)

        monkeypatch.setattr(path_type, name, method)

    refuse_buckets("exists")
    refuse_buckets("read_bytes")
    for call in (
        lambda: calm_jax.convert("gs://bucket/a", tmp_path / "model"),
        lambda: calm_jax.convert(source, "gs://bucket/a"),
        lambda: calm_jax.load("gs://bucket/a"),
    ):
        with pytest.raises(CalmError, match=r"cannot read gs://bucket/a.*: .*no access$"):
            call()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "decoder"}, r"is a decoder's run; --to=huggingface exports \S+/frozen"),
        ({"kind": "composed"}, "is a composed run, not a checkpoint of another program"),
        ({"format": "calm_jax bridge, version 9"}, "is an exported bridge, not a checkpoint"),
        ({"format": "calm_jax frozen folder, version 2"}, "is a frozen folder, not a checkpoint"),
        ({"kind": ["composed"]}, "no tensors in"),
    ],
)
def test_what_is_no_source(config, message, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CalmError, match=message):
        calm_jax.convert(tmp_path / "source", tmp_path / "model")


def test_a_target_that_exists_is_left_alone(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CalmError, match=r"exists; give another path"):
        calm_jax.convert(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers(tmp_path, value, dtype):
    tensors = random_tensors(dtype)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_source(tmp_path / "source", tensors)
    (tmp_path / "targets").mkdir()
    message = r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"
    with pytest.raises(CalmError, match=message):
        calm_jax.convert(tmp_path / "source", tmp_path / "targets" / "model")
    assert nothing_in(tmp_path / "targets")


def test_weights_too_large_for_the_dtype(tmp_path):
    tensors = random_tensors()
    tensors["lm_head.weight"][0, 0] = 3.4e38  # finite, and rounded up it is not
    save_source(tmp_path / "source", tensors)
    message = r"tensor lm_head\.weight has values too large for bfloat16"
    with pytest.raises(CalmError, match=message):
        calm_jax.convert(tmp_path / "source", tmp_path / "model", dtype="bfloat16")
    calm_jax.convert(tmp_path / "source", tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"llama: tensor model\.norm\.weight is missing"),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.zeros((F, D))}),
            r"llama: tensor model\.layers\.3\.mlp\.up_proj\.weight is not part of the model",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((V, D + 1), np.float32)}),
            r"llama: tensor lm_head\.weight has shape \(40, 17\), the config says \(40, 16\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((V, D), np.int32)}),
            r"llama: tensor lm_head\.weight is int32; weights must be floats",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((V, D), np.float64)}),
            r"llama holds float64, which is not stored exactly; choose a --dtype",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path, change, message):
    tensors = random_tensors()
    change(tensors)
    save_source(tmp_path / "llama", tensors)
    with pytest.raises(CalmError, match=message):
        calm_jax.convert(tmp_path / "llama", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_other_families_are_refused_by_name(tmp_path):
    save_source(
        tmp_path / "s", random_tensors(), CONFIG | {"architectures": ["MixtralForCausalLM"]}
    )
    with pytest.raises(CalmError, match=r"MixtralForCausalLM.* not supported; supported are llama"):
        calm_jax.convert(tmp_path / "s", tmp_path / "model")


def test_unknown_options_formats_and_dtypes(source, tmp_path):
    with pytest.raises(CalmError, match=r"norm_offset is not an option of llama; known are none"):
        calm_jax.convert(source, tmp_path / "model", norm_offset=1.0)
    with pytest.raises(CalmError, match=r"--format=lama is unknown; known are auto, llama"):
        calm_jax.convert(source, tmp_path / "model", format="lama")
    with pytest.raises(CalmError, match=r"llama is of the family llama, not mistral"):
        calm_jax.convert(source, tmp_path / "model", format="mistral")
    with pytest.raises(CalmError, match=r"--dtype=int8 is unknown; known are float32, bfloat16"):
        calm_jax.convert(source, tmp_path / "model", dtype="int8")
    with pytest.raises(CalmError, match=r"nowhere is not a checkpoint: it does not exist"):
        calm_jax.convert(tmp_path / "nowhere", tmp_path / "model")
    assert nothing_in(tmp_path)


def test_no_space_left(source, tmp_path):
    """A limit on the size of files makes the writes fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CalmError, match=r"cannot write .*: File too large") as caught:
            calm_jax.convert(source, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert nothing_in(tmp_path)


KILLED = """
import sys, time
import calm_jax
from calm_jax.checkpoints import chunks

write, written = chunks.Writer._write, []

def slowly(self, *arguments):
    write(self, *arguments)
    written.append(1)
    if len(written) == 10:
        print("ten chunks", flush=True)
        time.sleep(60)

chunks.Writer._write = slowly
calm_jax.convert(*sys.argv[1:])
"""


def test_a_killed_conversion_leaves_nothing_that_loads(source, tmp_path):
    target = tmp_path / "model"
    command = [sys.executable, "-c", KILLED, str(source), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
    assert process.stdout.readline() == b"ten chunks\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model.")
    with pytest.raises(CalmError, match="is not a frozen folder"):
        calm_jax.load(left)
    calm_jax.convert(source, target)
    calm_jax.load(target)


def test_a_pickle_of_torch_in_place_of_safetensors_is_the_same_model(source, tmp_path):
    older = tmp_path / "source"
    older.mkdir()
    shutil.copy(source / "config.json", older)
    torch_files.save_tensors(older / "pytorch_model.bin", random_tensors())
    for path, name in ((source, "one"), (older, "other")):
        calm_jax.convert(path, tmp_path / name)
    one, other = (calm_jax.load(tmp_path / name) for name in ("one", "other"))
    assert one.fingerprint == other.fingerprint


def test_the_vocabulary_goes_along(tmp_path):
    source = save_source(tmp_path / "source", random_tensors())
    vocabulary = load_vocabulary("key_value/tiny")
    vocabulary.save(source)
    with pytest.raises(CalmError, match=rf"has {vocabulary.size} tokens, the embedding {V} rows"):
        calm_jax.convert(source, tmp_path / "model")
    tensors = random_tensors()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = np.zeros((vocabulary.size, D), np.float32)
    save_source(source, tensors, CONFIG | {"vocab_size": vocabulary.size})
    calm_jax.convert(source, tmp_path / "model")
    shutil.rmtree(source)
    assert calm_jax.load(tmp_path / "model").vocabulary.tokens() == vocabulary.tokens()


def test_a_lone_file_takes_only_a_vocabulary_that_no_other_file_can_mean(tmp_path, caplog):
    vocabulary = load_vocabulary("key_value/tiny")
    shapes = {
        "token_embedder/embedding": (vocabulary.size, 16),
        "layers_0/layer_norm/scale": (16,),
        "layers_0/q_wi_fused/kernel": (16, 2, 40),
        "layers_0/kv_fused/kernel": (16, 1, 16),
        "layers_0/o_wo_fused/kernel": (2, 24, 16),
    }
    path = tmp_path / "files" / "palm.npz"
    path.parent.mkdir()
    np.savez(path, **{f"decoder/{k}": np.zeros(v, np.float32) for k, v in shapes.items()})

    def found(name):
        calm_jax.convert(path, tmp_path / name)
        return calm_jax.load(tmp_path / name).vocabulary

    assert found("alone") is None
    assert "vocabulary" not in caplog.text
    vocabulary.save_published(path.parent)
    assert found("with one").tokens() == vocabulary.tokens()
    assert "with the vocabulary in its folder, tokenizer.json" in caplog.text
    (path.parent / "other.model").write_bytes(b"of another model")
    assert found("with two") is None
    assert "without a vocabulary: its folder has other.model, tokenizer.json" in caplog.text


def test_verification_is_noted_in_the_folder(source, tmp_path, monkeypatch):
    monkeypatch.setattr(verification.importlib.util, "find_spec", lambda _: None)
    calm_jax.convert(source, tmp_path / "model", verify=True)
    noted = json.loads((tmp_path / "model" / "verification.json").read_text())
    logits = np.asarray(calm_jax.load(tmp_path / "model")(np.asarray(noted["prompts"], np.int32)))
    np.testing.assert_array_equal(np.argmax(logits[:, -1], -1), np.array(noted["best_next"])[:, 0])
    assert noted["compared_with"] is None


@pytest.mark.parametrize("in_place", [False, True])
def test_a_verification_that_fails_leaves_nothing(in_place, source, tmp_path, monkeypatch):
    """In place is how a bucket is written, where config.json alone makes a folder a model."""
    seen = []

    def other_logits(logits, tokens, source, described, adapter):
        seen.extend(path.name for path in described.folder.iterdir())
        raise CalmError("its logits differ")

    monkeypatch.setattr(files, "is_bucket", lambda _: in_place)
    monkeypatch.setattr(verification, "_compare", other_logits)
    with pytest.raises(CalmError, match="its logits differ"):
        calm_jax.convert(source, tmp_path / "model", verify=True)
    assert "weights" in seen and "config.json" not in seen
    assert nothing_in(tmp_path)


def test_logits_that_are_not_finite_are_no_model(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Decoder, "__call__", lambda self, tokens: np.full((1, 1, 8), np.inf))
    with pytest.raises(CalmError, match="it computes logits that are not finite"):
        calm_jax.convert(source, tmp_path / "model", verify=True)
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("missing", ["transformers", "torch"])
def test_verification_says_what_it_cannot_know(missing, source, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        verification.importlib.util, "find_spec", lambda name: None if name == missing else name
    )
    with caplog.at_level(logging.INFO, "absl"):
        calm_jax.convert(source, tmp_path / "model", verify=True)
    assert f"{missing} is not installed to compare them" in caplog.text
    assert "Not covered: damage of the source's weights from before the conversion" in caplog.text


def test_prompts_are_longer_than_a_window_that_is_not_large():
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
    for window, length in ((None, 64), (8, 64), (64, 128), (512, 576), (1024, 1088), (4096, 64)):
        config = calm_jax.DecoderConfig.palm(vocab_size=40, **sizes, window=window)
        prompts = verification.fixed_prompts(config)
        assert prompts.shape == (3 if length == 64 else 1, length)
        assert prompts.min() >= 0 and prompts.max() < 40


def test_the_command(source, tmp_path, capsys):
    model, exported = tmp_path / "model", tmp_path / "exported"
    assert main(["convert", f"--source={source}", f"--target={model}", "--dtype=bfloat16"]) == 0
    assert capsys.readouterr().out == f"{model}\n"
    assert main(["convert", f"--source={model}", f"--target={exported}", "--to=huggingface"]) == 0
    assert (exported / "model.safetensors").exists()
    arguments = ["convert", f"--source={source}", f"--target={tmp_path / 'other'}"]
    assert main([*arguments, "--option=norm_offset"]) == 2
    assert "--option=norm_offset is not NAME=VALUE" in capsys.readouterr().err
    assert main([*arguments, "--to=huggingface", "--verify"]) == 2
    assert "--verify has no effect with --to=huggingface" in capsys.readouterr().err


def test_a_family_by_name_is_no_way_around_the_config(tmp_path):
    """Multipliers of Granite would be dropped, and so would the window of a Mistral."""
    granite = {"architectures": ["GraniteForCausalLM"], "residual_multiplier": 0.2}
    save_source(tmp_path / "granite", random_tensors(), CONFIG | granite)
    mistral = {"model_type": "mistral", "sliding_window": 4}
    save_source(tmp_path / "mistral", random_tensors(), CONFIG | mistral)
    for name, format in (("granite", "llama"), ("granite", "auto"), ("mistral", "auto")):
        with pytest.raises(CalmError, match=rf"{name}: config\.json says .* is not supported"):
            calm_jax.convert(tmp_path / name, tmp_path / "model", format=format)


def test_a_bridge_fits_no_model_of_other_form_with_the_same_weights(source, tmp_path):
    from flax import nnx

    calm_jax.convert(source, tmp_path / "one")
    changed = save_source(tmp_path / "source", random_tensors(), CONFIG | {"rope_theta": 5e3})
    calm_jax.convert(changed, tmp_path / "other")
    one, other = (calm_jax.load(tmp_path / name) for name in ("one", "other"))
    assert one.fingerprint != other.fingerprint
    connections = calm_jax.CompositionConfig(connections=((1, 1),))
    composed = calm_jax.compose(one, calm_jax.load(tmp_path / "one"), connections, rngs=nnx.Rngs(0))
    calm_jax.export_bridge(composed, tmp_path / "bridge")
    with pytest.raises(CalmError, match=rf"{one.fingerprint[:16]}.*{other.fingerprint[:16]}"):
        calm_jax.load_composed(tmp_path / "bridge", anchor=tmp_path / "other")
    cast = calm_jax.load(tmp_path / "one", dtype="bfloat16")
    with pytest.raises(CalmError, match=rf"is {one.fingerprint[:16]} as bfloat16"):
        calm_jax.load_composed(tmp_path / "bridge", anchor=cast)


def test_a_frozen_folder_is_no_source(source, tmp_path):
    calm_jax.convert(source, tmp_path / "model")
    with pytest.raises(CalmError, match=r"is already a frozen folder; --to=huggingface"):
        calm_jax.convert(tmp_path / "model", tmp_path / "again")


def test_chunks_for_a_bucket_are_bytes(source, tmp_path, monkeypatch):
    """Clients of buckets refuse arrays."""
    written = []
    monkeypatch.setattr(chunks, "is_bucket", lambda path: ".weights" not in str(path))
    monkeypatch.setattr(chunks, "_open", lambda *_, **__: None)

    class Opened:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            assert type(data) is bytes
            written.append(len(data))

    class Folder(type(epath.Path(tmp_path))):
        def open(self, mode):
            return Opened() if mode == "wb" else super().open(mode)

    (tmp_path / "weights").mkdir()
    layout = chunks.Layout({"w": (4, 6)}, (), "float32")
    with chunks.Writer(Folder(tmp_path / "weights"), layout) as writer:
        writer.add("w", np.ones((4, 6), np.float32))
    assert written == [96]
