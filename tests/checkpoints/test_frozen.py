import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_models
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from quantized_models import of_int4
from tiny_models import stored_bytes

from calm_jax import sharding
from calm_jax.checkpoints import frozen
from calm_jax.checkpoints.convert.export import export
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Decoder, compose
from calm_jax.models.parameters import module_tree

TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCAB, (2, 7)).astype(np.int32)


@pytest.fixture(scope="module")
def decoder():
    return tiny_models.decoder(family="llama")


@pytest.fixture(scope="module")
def folder(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen") / "model"
    frozen.save_frozen(decoder, folder, vocabulary=load_vocabulary("key_value/tiny"))
    return folder


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(folder, tmp_path / "model")


def change_config(folder, change):
    """Changes config.json as if it had been written so."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    values.pop("checksum")
    text = json.dumps(values, sort_keys=True)
    path.write_text(json.dumps({**values, "checksum": hashlib.sha256(text.encode()).hexdigest()}))


def change_form(folder, **changes):
    change_config(folder, lambda values: values["decoder"].update(changes))


def chunk_files(folder):
    return sorted((folder / "weights").rglob("c.*"))


def test_what_is_loaded_is_what_was_saved(decoder, folder):
    loaded = frozen.load(folder)
    assert stored_bytes(loaded) == stored_bytes(decoder)
    assert loaded.config == decoder.config
    assert loaded.source == str(folder)
    assert loaded.fingerprint == json.loads((folder / "config.json").read_text())["fingerprint"]
    vocabulary = load_vocabulary("key_value/tiny")
    assert loaded.vocabulary.tokens() == vocabulary.tokens()
    assert (loaded.vocabulary.bos_id, loaded.vocabulary.eos_id) == (1, 2)
    np.testing.assert_array_equal(loaded(TOKENS), decoder(TOKENS))


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_onto_a_mesh(decoder, folder, shape):
    mesh = sharding.make_mesh(shape)
    loaded = frozen.load(folder, mesh=mesh)
    assert stored_bytes(loaded) == stored_bytes(decoder)
    table = loaded.embedding.get_value()
    tensor = "tensor" if mesh.shape["tensor"] > 1 else None
    wanted = jax.sharding.NamedSharding(mesh, PartitionSpec(tensor, "fsdp"))
    assert table.sharding.is_equivalent_to(wanted, 2)
    assert {x.sharding.mesh for x in jax.tree.leaves(nnx.state(loaded))} == {mesh}
    assert frozen.fingerprint(loaded) == loaded.fingerprint


def test_a_composed_decoder_is_saved_as_it_was(decoder, folder, tmp_path):
    anchor = frozen.load(folder)
    compose(anchor, tiny_models.decoder(embed_dim=16), CompositionConfig(), rngs=nnx.Rngs(0))
    assert frozen.fingerprint(anchor) == anchor.fingerprint
    identity = frozen.save_frozen(anchor, tmp_path / "again")
    assert identity == frozen.load(folder).fingerprint
    loaded = frozen.load(tmp_path / "again")
    assert stored_bytes(loaded) == stored_bytes(decoder)
    assert loaded.vocabulary.tokens() == anchor.vocabulary.tokens()


def test_any_change_of_a_bit_a_name_or_a_dtype_changes_the_fingerprint(decoder):
    identities = {frozen.fingerprint(decoder)}
    table = np.array(decoder.embedding.get_value())
    table.view(np.uint32)[3, 5] ^= 1
    for changes in ({}, {"dtype": "bfloat16"}, {"tied_head": True}, {"rope_base": 5e3}):
        other = tiny_models.decoder(family="llama", **changes)
        if not changes:
            assert frozen.fingerprint(other) in identities
            other.embedding.set_value(jnp.asarray(table))
        identities.add(frozen.fingerprint(other))
    assert len(identities) == 5


def test_many_chunks(decoder, tmp_path, chunks_of):
    with chunks_of(1000):
        identity = frozen.save_frozen(decoder, tmp_path / "model")
        assert len(chunk_files(tmp_path / "model")) > 100
        assert frozen.fingerprint(decoder) == identity
        for mesh in (None, sharding.make_mesh({"fsdp": 4, "tensor": 2})):
            loaded = frozen.load(tmp_path / "model", mesh=mesh)
            assert stored_bytes(loaded) == stored_bytes(decoder)
    # How arrays are split into chunks is part of the format, and of the fingerprint.
    with pytest.raises(CalmError, match=r"has chunk \(.*\), the model needs \("):
        frozen.load(tmp_path / "model")


def test_orbax_restores_the_weights(decoder, folder):
    wanted = module_tree(decoder)
    replicated = NamedSharding(sharding.make_mesh({"fsdp": 8}), PartitionSpec())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), wanted
    )
    with ocp.StandardCheckpointer() as checkpointer:
        onto_a_mesh = checkpointer.restore(folder / "weights", abstract)
    assert stored_bytes(onto_a_mesh) == stored_bytes(wanted)
    with ocp.PyTreeCheckpointer() as checkpointer:
        without_a_target = checkpointer.restore(folder / "weights")
    assert stored_bytes(without_a_target) == stored_bytes(wanted)


def test_dtype(decoder, folder, tmp_path):
    loaded = frozen.load(folder, dtype="bfloat16")
    assert loaded.config.dtype == "bfloat16"
    assert loaded.fingerprint == frozen.load(folder).fingerprint + " as bfloat16"
    stored = stored_bytes(loaded)
    rounded = {
        path: np.frombuffer(raw, np.float32).astype(jnp.bfloat16).tobytes()
        for path, raw in stored_bytes(decoder).items()
    }
    assert stored == rounded
    assert loaded(TOKENS).dtype == jnp.float32
    # Saved in that dtype, it comes back in that dtype, in half the bytes.
    frozen.save_frozen(loaded, tmp_path / "half")
    again = frozen.load(tmp_path / "half")
    assert again.config.dtype == "bfloat16"
    assert stored_bytes(again) == stored
    assert again.fingerprint not in (None, frozen.load(folder).fingerprint)


@pytest.mark.parametrize("mesh_shape", [None, {"fsdp": 4, "tensor": 2}])
def test_int8(decoder, folder, tmp_path, mesh_shape):
    mesh = mesh_shape and sharding.make_mesh(mesh_shape)
    loaded = frozen.load(folder, mesh=mesh, dtype="int8")
    assert loaded.config == dataclasses.replace(decoder.config, weights="int8")
    assert loaded.fingerprint == frozen.load(folder).fingerprint + " as int8"
    weight_DF = np.asarray(decoder.layers.mlp.gate.get_value())[2]
    found = loaded.layers.mlp
    scale_F = np.abs(weight_DF).max(0) / 127
    np.testing.assert_allclose(found.gate_scale.get_value()[2], scale_F, rtol=1e-6)
    values_DF = np.asarray(found.gate.get_value()[2])
    assert values_DF.dtype == np.int8
    assert np.abs(values_DF * scale_F - weight_DF).max() <= scale_F.max() * 0.501
    logits, exact = np.asarray(loaded(TOKENS)), np.asarray(decoder(TOKENS))
    assert 0 < np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2)) < 0.03
    # It is not a model of its own.
    with pytest.raises(CalmError, match="weights are int8, rounded while they were loaded"):
        frozen.save_frozen(loaded, tmp_path / "int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mesh_shape", [None, {"fsdp": 4, "tensor": 2}])
def test_int4(decoder, folder, tmp_path, mesh_shape):
    mesh = mesh_shape and sharding.make_mesh(mesh_shape)
    loaded = frozen.load(folder, mesh=mesh, dtype="int4")
    assert loaded.config == dataclasses.replace(decoder.config, weights="int4")
    assert loaded.fingerprint == frozen.load(folder).fingerprint + " as int4"
    weight_DF = np.asarray(decoder.layers.mlp.gate.get_value())[2]  # one group of 32 to a column
    packed_EF = np.asarray(loaded.layers.mlp.gate.get_value()[2])
    scale_GF = np.asarray(loaded.layers.mlp.gate_scale.get_value()[2])
    assert (packed_EF.dtype, packed_EF.shape) == (np.uint8, (16, 32))
    assert (scale_GF.dtype, scale_GF.shape) == (np.float16, (1, 32))
    errors_DF = np.abs(of_int4(packed_EF, scale_GF, 0) - weight_DF)
    assert np.all(errors_DF <= 0.501 * np.abs(scale_GF))
    steps = np.abs(weight_DF).max(0) / np.abs(scale_GF[0])
    assert np.all(np.isclose(steps, 7, rtol=1e-3) | np.isclose(steps, 8, rtol=1e-3))
    logits, exact = np.asarray(loaded(TOKENS)), np.asarray(decoder(TOKENS))
    assert 0.03 < np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2)) < 0.3
    with pytest.raises(CalmError, match="weights are int4, rounded while they were loaded"):
        frozen.save_frozen(loaded, tmp_path / "int4")
    assert not list(tmp_path.iterdir())


def test_an_unknown_dtype(folder):
    known = "float32, bfloat16, int8, int4"
    with pytest.raises(CalmError, match=f"dtype 'int3' is unknown; known are {known}$"):
        frozen.load(folder, dtype="int3")


def test_a_matrix_without_groups_of_int4(tmp_path):
    frozen.save_frozen(tiny_models.decoder(mlp_dim=37, num_layers=1), tmp_path / "odd")
    message = "layers/mlp/down: mlp of size 37 has no even divisor from 8 to 32"
    with pytest.raises(CalmError, match=message):
        frozen.load(tmp_path / "odd", dtype="int4")
    assert frozen.load(tmp_path / "odd", dtype="int8").config.weights == "int8"


def test_a_float32_decoder_of_a_bfloat16_config_is_saved_in_bfloat16(tmp_path):
    model = tiny_models.decoder(dtype="bfloat16")
    identity = frozen.save_frozen(model, tmp_path / "model")
    loaded = frozen.load(tmp_path / "model")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(loaded))} == {jnp.dtype(jnp.bfloat16)}
    assert frozen.fingerprint(loaded) == identity


def test_the_name_of_a_model_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    download = r"does not exist; if org/model is .* hf download org/model --local-dir model$"
    with pytest.raises(CalmError, match=download):
        frozen.load("org/model")
    for path in ("models/model", "model", "org/model/deeper"):
        with pytest.raises(CalmError, match=rf"{path} is not a frozen folder: it does not exist$"):
            frozen.load(path)


def test_not_a_frozen_folder(tmp_path):
    with pytest.raises(CalmError, match=r"nothing is not a frozen folder: it does not exist$"):
        frozen.load(tmp_path / "nothing")
    with pytest.raises(CalmError, match=r"is not a frozen folder: config\.json is missing$"):
        frozen.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CalmError, match=r"is not a frozen folder: it is an adapter; calm convert"):
        frozen.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CalmError, match=r"file is not a frozen folder: it is a file"):
        frozen.load(tmp_path / "file")


def test_missing_weights(damaged):
    shutil.rmtree(damaged / "weights")
    with pytest.raises(CalmError, match=r"weights: .* does not exist") as caught:
        frozen.load(damaged)
    assert "\n" not in str(caught.value)


def test_half_a_chunk(damaged):
    for path in chunk_files(damaged):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CalmError, match=r"weights: ") as caught:
        frozen.load(damaged)
    assert "\n" not in str(caught.value)


def test_a_missing_chunk_is_not_zero(damaged):
    path = next(p for p in chunk_files(damaged) if "mlp.gate" in str(p))
    path.unlink()
    with pytest.raises(CalmError, match=r"layers/mlp/gate.* missing"):
        frozen.load(damaged)


def test_one_bit_of_one_weight(damaged):
    path = next(p for p in chunk_files(damaged) if "attention.value" in str(p))
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        CalmError, match=r"layers/attention/value: chunk c\.0\.0\.0\.0 is damaged: its h"
    ):
        frozen.load(damaged)


def test_chunks_in_each_other_s_place(damaged):
    one, other = [p for p in chunk_files(damaged) if "mlp.up" in str(p)][:2]
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(CalmError, match=r"layers/mlp/up: chunk c\.\d\.0\.0 is damaged"):
        frozen.load(damaged)


def test_another_list_of_chunks(damaged):
    path = damaged / "chunks.json"
    path.write_text(path.read_text().replace("a", "b", 1))
    with pytest.raises(CalmError, match=r"chunks\.json is damaged: its SHA-256 is"):
        frozen.load(damaged)
    path.unlink()
    with pytest.raises(CalmError, match=r"cannot read .*chunks\.json: No such file"):
        frozen.load(damaged)


def test_truncated_config(damaged):
    path = damaged / "config.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(CalmError, match=r"config\.json:\d+: not JSON"):
        frozen.load(damaged)


@pytest.mark.parametrize("key", ["decoder", "fingerprint", "chunks", "files", "origin"])
def test_config_without_a_key(damaged, key):
    change_config(damaged, lambda values: values.pop(key))
    with pytest.raises(CalmError, match=rf"config\.json is damaged: it has no '{key}'"):
        frozen.load(damaged)


def test_config_that_was_edited(damaged):
    path = damaged / "config.json"
    path.write_text(path.read_text().replace('"norm_eps": 1e-05', '"norm_eps": 1e-06'))
    with pytest.raises(CalmError, match=r"config\.json is damaged: its checksum is"):
        frozen.load(damaged)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "calm_jax frozen folder, version 9"}, r"config\.json: format is .*version 9"),
        ([], r"config\.json is damaged: it is not a JSON object"),
        ({}, r"is a folder of another program, not a frozen folder; make .*: calm convert --so"),
        (
            {"model_type": "llama"},
            r"is a Hugging Face folder.*convert --source=\S* --target=",
        ),
        ({"kind": "decoder", "train": {}}, r"is a decoder's run.*; that is \S*/frozen$"),
    ],
)
def test_another_kind_of_folder(damaged, values, message):
    (damaged / "config.json").write_text(json.dumps(values))
    with pytest.raises(CalmError, match=message):
        frozen.load(damaged)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"kind": "composed"}, "a composed run"),
        ({"format": "calm_jax bridge, version 1"}, "an exported bridge"),
    ],
)
def test_a_composed_model_is_not_exported(damaged, tmp_path, values, kind):
    (damaged / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        CalmError, match=rf"is {kind}, not a frozen folder; .* cannot be composed again"
    ):
        export(damaged, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_config_of_another_width_than_the_weights(damaged):
    change_form(damaged, mlp_dim=48)
    message = r"layers/mlp/down has shape \(4, 32, 32\), the model needs \(4, 48, 32\)"
    with pytest.raises(CalmError, match=message):
        frozen.load(damaged)


def test_config_of_another_form_than_the_weights(damaged):
    change_form(damaged, tied_head=True)
    with pytest.raises(CalmError, match=r"head is not part of the model"):
        frozen.load(damaged)
    change_form(damaged, tied_head=False, norm_bias=True)
    with pytest.raises(CalmError, match=r"final_norm/bias is missing"):
        frozen.load(damaged)


def test_config_of_another_dtype_than_the_weights(damaged):
    change_form(damaged, dtype="bfloat16")
    with pytest.raises(CalmError, match=r"float32.*bfloat16"):
        frozen.load(damaged)


def test_vocabulary_of_another_model(damaged):
    shutil.rmtree(damaged / "vocabulary")
    with pytest.raises(CalmError, match=r"cannot read .*vocabulary"):
        frozen.load(damaged)
    load_vocabulary("bytes").save(damaged / "vocabulary")
    with pytest.raises(CalmError, match=r"vocabulary"):
        frozen.load(damaged)


def test_one_letter_of_a_vocabulary_file(damaged):
    path = damaged / "vocabulary" / "tokenizer.json"
    path.write_text(path.read_text().replace("=", "~", 1))
    with pytest.raises(CalmError, match=r"tokenizer\.json is damaged: its SHA-256 is"):
        frozen.load(damaged)


def test_unknown_field_of_a_later_version(damaged):
    change_form(damaged, experts=8)
    with pytest.raises(CalmError, match=r"decoder\.experts is not a known field"):
        frozen.load(damaged)


def test_a_target_that_exists_is_left_alone(decoder, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(CalmError, match=r"model exists; give another path"):
        frozen.save_frozen(decoder, tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


def test_a_failure_while_saving_leaves_nothing(decoder, tmp_path):
    class Failing:
        fingerprint = ""

        def save(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(CalmError, match=r"cannot write .*model: No space left on device"):
        frozen.save_frozen(decoder, tmp_path / "model", vocabulary=Failing())
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_of_the_target(decoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalmError, match=r"cannot write .*file/model"):
        frozen.save_frozen(decoder, tmp_path / "file" / "model")


def test_every_field_of_the_form_survives(tmp_path):
    model = tiny_models.decoder(
        family="gemma",
        num_kv_heads=4,
        window=4,
        window_pattern=(True, False),
        attention_bias=True,
        final_logit_cap=30.0,
        qk_norm="rms",
        post_norms=True,
        tied_head=False,
        head_bias=True,
    )
    frozen.save_frozen(model, tmp_path / "model")
    loaded = frozen.load(tmp_path / "model")
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(model.config)
    assert isinstance(loaded, Decoder)
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))


def test_files_that_the_vocabulary_does_not_have_are_refused(damaged):
    (damaged / "vocabulary" / "chat_template.jinja").write_text("hello")
    with pytest.raises(CalmError, match=r"chat_template\.jinja is not part of the model"):
        frozen.load(damaged)
