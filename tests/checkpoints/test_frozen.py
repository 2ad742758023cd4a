import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from jax.sharding import PartitionSpec
from tiny_models import stored_bytes

from calm_jax import sharding
from calm_jax.checkpoints import frozen
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Decoder, compose

TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCAB, (2, 7)).astype(np.int32)


@pytest.fixture(scope="module")
def decoder():
    return tiny_models.decoder(form="llama")


@pytest.fixture(scope="module")
def folder(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen") / "model"
    frozen.save_frozen(decoder, folder, vocabulary=Vocabulary.load("key_value/tiny"))
    return folder


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(folder, tmp_path / "model")


def change_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["decoder"].update(changes)
    path.write_text(json.dumps(values))


def test_what_is_loaded_is_what_was_saved(decoder, folder):
    loaded = frozen.load(folder)
    assert stored_bytes(loaded) == stored_bytes(decoder)
    assert loaded.config == decoder.config
    assert loaded.source == str(folder)
    assert loaded.fingerprint == json.loads((folder / "config.json").read_text())["fingerprint"]
    vocabulary = Vocabulary.load("key_value/tiny")
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
    assert frozen.fingerprint(frozen.canonical_tree(loaded)) == loaded.fingerprint


def test_the_fingerprint_does_not_depend_on_how_the_layers_are_cut(folder):
    whole = frozen.load(folder)
    for config in (
        CompositionConfig(connections=((3, 0), (3, 2))),
        CompositionConfig(every=1),
    ):
        anchor = frozen.load(folder)
        composed = compose(anchor, tiny_models.decoder(embed_dim=16), config, rngs=nnx.Rngs(0))
        assert len(composed.anchor.layers.shapes) > 1
        assert frozen.fingerprint(frozen.canonical_tree(anchor)) == whole.fingerprint
        assert len(anchor.layers.shapes) > 1  # computing it did not join them


def test_a_cut_decoder_is_saved_whole(decoder, folder, tmp_path):
    anchor = frozen.load(folder)
    compose(anchor, tiny_models.decoder(embed_dim=16), CompositionConfig(), rngs=nnx.Rngs(0))
    identity = frozen.save_frozen(anchor, tmp_path / "again")
    assert identity == frozen.load(folder).fingerprint
    loaded = frozen.load(tmp_path / "again")
    assert stored_bytes(loaded) == stored_bytes(decoder)
    assert loaded.vocabulary.tokens() == anchor.vocabulary.tokens()


def test_any_change_of_a_bit_a_name_or_a_dtype_changes_the_fingerprint(decoder):
    tree = frozen.canonical_tree(decoder)
    identities = {frozen.fingerprint(tree)}
    changed = jax.tree.map(lambda x: x, tree)
    table = np.array(tree["embedding"])
    table.view(np.uint32)[3, 5] ^= 1
    changed["embedding"] = jnp.asarray(table)
    identities.add(frozen.fingerprint(changed))
    identities.add(frozen.fingerprint({**tree, "embedding": tree["embedding"].T}))
    identities.add(frozen.fingerprint({**tree, "embedding": tree["embedding"].astype("bfloat16")}))
    identities.add(
        frozen.fingerprint({"table" if k == "embedding" else k: v for k, v in tree.items()})
    )
    assert len(identities) == 5


def test_the_fingerprint_of_arrays_hashed_in_parts(decoder, monkeypatch):
    whole = frozen.fingerprint(frozen.canonical_tree(decoder))
    monkeypatch.setattr(frozen, "HASHED_BYTES", 1000)
    assert frozen.fingerprint(frozen.canonical_tree(decoder)) == whole


def test_dtype(decoder, folder, tmp_path):
    loaded = frozen.load(folder, dtype="bfloat16")
    assert loaded.config.dtype == "bfloat16"
    assert loaded.source is loaded.fingerprint is None  # no longer the model of the folder
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


def test_a_float32_decoder_of_a_bfloat16_config_is_saved_in_bfloat16(tmp_path):
    model = tiny_models.decoder(dtype="bfloat16")
    identity = frozen.save_frozen(model, tmp_path / "model")
    loaded = frozen.load(tmp_path / "model")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(loaded))} == {jnp.dtype(jnp.bfloat16)}
    assert frozen.fingerprint(frozen.canonical_tree(loaded)) == identity


def test_not_a_frozen_folder(tmp_path):
    with pytest.raises(CalmError, match=r"nothing is not a frozen folder: config\.json is missing"):
        frozen.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CalmError, match=r"file is not a frozen folder: it is a file"):
        frozen.load(tmp_path / "file")


def test_missing_weights(damaged):
    shutil.rmtree(damaged / "weights")
    with pytest.raises(CalmError, match=r"weights (cannot be|is missing)") as caught:
        frozen.load(damaged)
    assert "\n" not in str(caught.value)


def test_half_the_weights(damaged):
    data = [path for path in (damaged / "weights").rglob("d/*") if path.is_file()]
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CalmError, match=r"weights (cannot be|is missing)") as caught:
        frozen.load(damaged)
    assert "\n" not in str(caught.value)


def test_truncated_config(damaged):
    path = damaged / "config.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(CalmError, match=r"config\.json is damaged"):
        frozen.load(damaged)


@pytest.mark.parametrize("key", ["decoder", "fingerprint"])
def test_config_without_a_key(damaged, key):
    path = damaged / "config.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    with pytest.raises(CalmError, match=rf"config\.json is damaged: it has no '{key}'"):
        frozen.load(damaged)


@pytest.mark.parametrize("text", ['{"format": "calm_jax frozen folder, version 9"}', "{}", "[]"])
def test_another_format(damaged, text):
    (damaged / "config.json").write_text(text)
    with pytest.raises(CalmError, match=r"config\.json"):
        frozen.load(damaged)


def test_config_of_another_width_than_the_weights(damaged):
    change_config(damaged, mlp_dim=48)
    message = r"layers/mlp/down has shape \(4, 32, 32\), the model needs \(4, 48, 32\)"
    with pytest.raises(CalmError, match=message):
        frozen.load(damaged)


def test_config_of_another_form_than_the_weights(damaged):
    change_config(damaged, tied_head=True)
    with pytest.raises(CalmError, match=r"head is not part of the model"):
        frozen.load(damaged)
    change_config(damaged, tied_head=False, norm_bias=True)
    with pytest.raises(CalmError, match=r"final_norm/bias is missing"):
        frozen.load(damaged)


def test_config_of_another_dtype_than_the_weights(damaged):
    change_config(damaged, dtype="bfloat16")
    with pytest.raises(CalmError, match=r"float32.*bfloat16"):
        frozen.load(damaged)


def test_vocabulary_of_another_model(damaged):
    shutil.rmtree(damaged / "vocabulary")
    with pytest.raises(CalmError, match=r"vocabulary"):
        frozen.load(damaged)
    Vocabulary.load("bytes").save(damaged / "vocabulary")
    names = Vocabulary.load("bytes"), Vocabulary.load("key_value/tiny")
    found, saved = (vocabulary.fingerprint[:16] for vocabulary in names)
    with pytest.raises(CalmError, match=rf"{found}, but the model was saved with {saved}"):
        frozen.load(damaged)


def test_unknown_field_of_a_later_version(damaged):
    change_config(damaged, experts=8)
    with pytest.raises(CalmError, match=r"decoder\.experts is not a known field"):
        frozen.load(damaged)


def test_a_target_that_exists_is_left_alone(decoder, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(CalmError, match=r"model exists; give another place"):
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
        form="gemma",
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
