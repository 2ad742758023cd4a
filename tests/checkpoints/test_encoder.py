"""Image encoders of transformers: states, items, refusals, and exported bridges to them."""

import json
import pathlib
import shutil

import hypothesis
import jax
import numpy as np
import pytest
import tiny_models
from flax import nnx
from hypothesis import strategies as st
from image_encoders import difference, states_of
from safetensors.numpy import load_file, save_file

import calm_jax
from calm_jax import sharding
from calm_jax.checkpoints.any_model import load_model
from calm_jax.checkpoints.convert import vit
from calm_jax.checkpoints.encoder import encoder_fingerprint
from calm_jax.data import own_features, own_tokens
from calm_jax.data.own_features import Placed
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose
from calm_jax.models.image_encoder import ImageEncoder
from calm_jax.models.parameters import Structure, count, path_name

GOLDEN = pathlib.Path(__file__).parent / "convert/golden"
NAMES = ("vit", "vit_oblong")
CONFIG = CompositionConfig(connections=((0, 0), (2, 2)))


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "vit", tmp_path / "vit")


def golden(name):
    with np.load(GOLDEN / name / "states.npz") as arrays:
        return {key: arrays[key] for key in arrays}


@pytest.mark.parametrize("name", NAMES)
def test_states_of_transformers(name):
    """The outputs are by tests/parity/make_vit_golden.py."""
    expected, encoder = golden(name), calm_jax.load_encoder(GOLDEN / name, dtype="float32")
    assert (encoder.depth, encoder.width) == (3, 16)
    assert difference(states_of(encoder, expected["pixel_values"]), expected["states"]) <= 4e-6


@pytest.mark.parametrize("name", NAMES)
def test_items_of_images(name):
    expected, encoder = golden(name), calm_jax.load_encoder(GOLDEN / name)
    for image, pixel_values in zip(expected["images"], expected["pixel_values"], strict=True):
        item = encoder.item(image)
        assert (item.shape, item.dtype) == (encoder.item_shape, np.float32)
        assert difference([item], [encoder.item_of_pixel_values(pixel_values)]) <= 1e-6


def test_the_order_of_an_item(folder):
    """Patches row by row, and in each its pixels row by row, with their channels together."""
    encoder = calm_jax.load_encoder(folder)
    assert encoder.item_shape == (10, 48)
    item = encoder.item_of_pixel_values(np.arange(3 * 12 * 12).reshape(3, 12, 12))
    np.testing.assert_array_equal(item[0], 0)
    np.testing.assert_array_equal(item[1, :7], [0, 144, 288, 1, 145, 289, 2])
    np.testing.assert_array_equal(item[1, 12:15], [12, 156, 300])
    np.testing.assert_array_equal(item[2, :3], [4, 148, 292])
    np.testing.assert_array_equal(item[4, :3], [48, 192, 336])


def test_dtypes(folder):
    exact, wide = calm_jax.load_encoder(folder), calm_jax.load_encoder(folder, dtype="float32")
    assert exact.config.dtype == "bfloat16" and exact.patches[...].dtype == "bfloat16"
    assert wide.config.dtype == "float32" and wide.patches[...].dtype == "float32"
    np.testing.assert_array_equal(
        wide.layers.mlp.up[...], exact.layers.mlp.up[...].astype("float32")
    )
    x_NCHW = golden("vit")["pixel_values"]
    assert difference(states_of(exact, x_NCHW), states_of(wide, x_NCHW)) <= 0.05
    assert exact.fingerprint != wide.fingerprint
    with pytest.raises(CalmError, match="dtype 'int8' is unknown; known are float32, bfloat16"):
        calm_jax.load_encoder(folder, dtype="int8")
    tensors = load_file(folder / "model.safetensors")
    mixed = {k: x.astype(np.float16) if "norm" in k else x for k, x in tensors.items()}
    save_file(mixed, folder / "model.safetensors")
    assert calm_jax.load_encoder(folder).config.dtype == "float32"


def test_on_a_mesh(folder):
    alone = calm_jax.load_encoder(folder, dtype="float32")
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    split = calm_jax.load_encoder(folder, mesh=mesh, dtype="float32")
    assert len(split.layers.mlp.up[...].sharding.device_set) == 8
    assert split.fingerprint == alone.fingerprint
    split.fingerprint = None
    assert encoder_fingerprint(split) == alone.fingerprint
    x_NCHW = golden("vit")["pixel_values"]
    expected = states_of(alone, x_NCHW)
    with jax.set_mesh(mesh):
        assert difference(states_of(split, x_NCHW), expected) <= 4e-6


def test_the_fingerprint_follows_config_and_weights(folder):
    first = calm_jax.load_encoder(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"] += 1  # not read
    save_file(tensors, folder / "model.safetensors")
    assert calm_jax.load_encoder(folder).fingerprint == first.fingerprint
    tensors["vit.encoder.layer.1.output.dense.bias"][3] += 1
    save_file(tensors, folder / "model.safetensors")
    weights = calm_jax.load_encoder(folder)
    change(folder, layer_norm_eps=1e-3)
    eps = calm_jax.load_encoder(folder)
    assert len({first.fingerprint, weights.fingerprint, eps.fingerprint}) == 3


def change(folder, file="config.json", **values):
    read = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(read | values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dinov2"}, "model_type is 'dinov2'; only 'vit' is supported"),
        ({"model_type": None}, "model_type is None; only 'vit' is supported"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; it must be one of silu, swish, gelu"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of num_attention_heads 4"),
        ({"head_dim": 8}, "head_dim is 8, which is not supported"),
        ({"image_size": 14}, r"image_size \(14, 14\) is not a multiple of patch_size \(4, 4\)"),
        ({"image_size": [12]}, r"image_size is \[12\]; it must be a whole number"),
        ({"patch_size": 0}, "patch_size is 0; it must be a whole number"),
        ({"qkv_bias": "yes"}, "qkv_bias is 'yes'; it must be true or false"),
        ({"quantization_config": {}}, "quantization_config is {}, which is not supported"),
        ({"num_hidden_layers": 4}, "encoder.layer.3.layernorm_before.weight is missing"),
        ({"num_hidden_layers": 2}, r"encoder.layer.2.attention.*config describes \(2 layers\)"),
        ({"qkv_bias": False}, "tensor encoder.layer.0.attention.attention.key.bias is not part of"),
        (
            {"image_size": 16},
            r"position_embeddings has shape \(1, 10, 16\), the config say",
        ),
        ({"num_channels": 1}, r"projection.weight has shape \(16, 3, 4, 4\), the config says"),
    ],
)
def test_configs_that_are_refused(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(CalmError, match=message) as caught:
        calm_jax.load_encoder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vit.embeddings.cls_token", None, "tensor embeddings.cls_token is missing"),
        ("vit.encoder.layer.0.gamma", np.ones(16, "f4"), "layer.0.gamma is not part of the model"),
        ("embeddings.cls_token", np.ones((1, 1, 16), "f4"), "tensors twice, with and without vit"),
        (
            "vit.embeddings.cls_token",
            np.full((1, 1, 16), np.nan, "f4"),
            "tensor embeddings.cls_token has entries that are not finite",
        ),
        (
            "vit.embeddings.cls_token",
            np.ones((1, 1, 16), np.int32),
            "tensor embeddings.cls_token is int32; weights must be float32, float16 or bfloat16",
        ),
    ],
)
def test_tensors_that_are_refused(folder, name, value, message):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = value
    kept = {k: x for k, x in tensors.items() if x is not None}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(CalmError, match=message) as caught:
        calm_jax.load_encoder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_std": [1.0, 0, 1]},
            r"image_std is \[1.0, 0, 1\]; it must have a finite number",
        ),
        (
            {"image_mean": [0.5]},
            r"image_mean is \[0.5\]; it must have a finite number",
        ),
        (
            {"rescale_factor": "1/255"},
            "rescale_factor is '1/255'; it must be a finite number",
        ),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True, which is not supported"),
    ],
)
def test_scales_of_pixels_that_are_refused(folder, changes, message):
    change(folder, "preprocessor_config.json", **changes)
    with pytest.raises(CalmError, match=message) as caught:
        calm_jax.load_encoder(folder)
    assert str(folder / "preprocessor_config.json") in str(caught.value)


def test_images_that_are_refused(folder):
    encoder, image = calm_jax.load_encoder(folder), np.zeros((12, 12, 3), np.uint8)
    for shape in ((12, 12), (13, 12, 3), (3, 12, 12), (12, 12, 4)):
        message = rf"has the shape \({str(shape)[1:-1]}\), but the encoder reads \(12, 12, 3\): hei"
        with pytest.raises(CalmError, match=message):
            encoder.item(np.zeros(shape, np.uint8))
    with pytest.raises(CalmError, match="the image is float64, but pixels must be uint8"):
        encoder.item(image / 255)
    with pytest.raises(CalmError, match=r"\(12, 12, 3\), but the encoder reads \(3, 12, 12\)"):
        encoder.item_of_pixel_values(image)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CalmError, match="vit does not say how pixels become inputs"):
        calm_jax.load_encoder(folder).item(image)


def test_other_sources_are_refused(folder, tmp_path):
    with pytest.raises(CalmError, match="missing is not a checkpoint: it does not exist"):
        calm_jax.load_encoder(tmp_path / "missing")
    np.savez(tmp_path / "vit.npz", x=np.ones(3))
    with pytest.raises(CalmError, match=r"vit\.npz is not a folder of Hugging Face"):
        calm_jax.load_encoder(tmp_path / "vit.npz")
    with pytest.raises(CalmError, match="model_type is 'llama'; only 'vit' is supported"):
        calm_jax.load_encoder(GOLDEN / "llama")
    with pytest.raises(CalmError, match=r"is an image encoder; calm_jax\.load_encoder reads it as"):
        calm_jax.convert(folder, tmp_path / "converted")


def test_parameters_of_the_published_sizes():
    """With the final norm, as many as ViTs have without a head (arXiv 2010.11929, table 1)."""
    for (patch, width, layers, heads), expected in {
        (16, 768, 12, 12): 85_798_656,
        (16, 1024, 24, 16): 303_301_632,
        (14, 1280, 32, 16): 630_764_800,
    }.items():
        values = {"model_type": "vit", "patch_size": patch, "hidden_size": width}
        values |= {"num_hidden_layers": layers, "num_attention_heads": heads}
        config = vit.encoder_config(values | {"intermediate_size": 4 * width}, "config.json")
        model = nnx.eval_shape(lambda config=config: ImageEncoder(config, nnx.Rngs(0)))
        assert count(Structure(model).abstract()) + 2 * width == expected
        named = {line.slices[0].target for line in vit.rules(config)}
        paths = jax.tree.leaves_with_path(Structure(model).abstract())
        assert named == {path_name(path) for path, _ in paths}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def test_any_config_is_read_or_refused():
    values = json.loads((GOLDEN / "vit/config.json").read_text())
    scale = json.loads((GOLDEN / "vit/preprocessor_config.json").read_text())

    @hypothesis.given(*(st.dictionaries(st.sampled_from(sorted(x)), JSON) for x in (values, scale)))
    @hypothesis.settings(max_examples=200)
    def check(changes, scale_changes):
        for read, arguments in (
            (vit.encoder_config, (values | changes,)),
            (vit.pixel_scale, (scale | scale_changes, 3)),
        ):
            try:
                hash(read(*arguments, "a/file.json"))
            except CalmError as error:
                assert "\n" not in str(error) and "a/file.json" in str(error)
                assert len(str(error)) < 500

    check()


def pair(folder, **options):
    encoder = calm_jax.load_encoder(folder, dtype="float32")
    composed = compose(tiny_models.decoder(), encoder, CONFIG, rngs=nnx.Rngs(0))
    return tiny_models.randomised(composed)


def logits_of(composed, image):
    batch = own_tokens.batch({}, [[1, 7, 3]])
    rows = [Placed([composed.augments[0].item(image)], [1])]
    batch |= own_features.own_arrays(0, composed.augments[0].item_shape, rows, batch)
    return composed(Inputs.of_batch(batch))


def test_an_exported_bridge_is_restored(folder, tmp_path):
    composed, image = pair(folder), golden("vit")["images"][0]
    calm_jax.save_frozen(composed.anchor, tmp_path / "anchor")
    composed.anchor = calm_jax.load(tmp_path / "anchor")
    calm_jax.export_bridge(composed, tmp_path / "bridge")
    expected = logits_of(composed, image)
    restored = calm_jax.load_composed(tmp_path / "bridge")
    assert isinstance(restored.augments[0], ImageEncoder)
    assert restored.augments[0].config.dtype == "float32"
    np.testing.assert_array_equal(logits_of(restored, image), expected)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(CalmError, match=r"the augment 0: .*if it has moved, give --augments"):
        calm_jax.load_composed(tmp_path / "bridge")
    for given in (moved, composed.augments[0]):
        again = calm_jax.load_composed(tmp_path / "bridge", augments=[given])
        np.testing.assert_array_equal(logits_of(again, image), expected)


def test_another_encoder_is_not_taken(folder, tmp_path):
    composed = pair(folder)
    calm_jax.export_bridge(composed, tmp_path / "bridge")
    given = {"anchor": composed.anchor, "augments": [folder]}
    calm_jax.load_composed(tmp_path / "bridge", **given)
    change(folder, layer_norm_eps=1e-3)
    with pytest.raises(CalmError, match=r"was trained with the augment 0 .* is "):
        calm_jax.load_composed(tmp_path / "bridge", **given)
    with pytest.raises(CalmError, match="anchor is a ImageEncoder; it must be a Decoder"):
        calm_jax.load_composed(tmp_path / "bridge", anchor=folder, augments=[folder])


def test_what_reads_no_images_says_so(folder, tmp_path):
    composed = pair(folder)
    with pytest.raises(CalmError, match="reads features, not tokens, which the form of transfor"):
        calm_jax.export_bridge(composed, tmp_path / "theirs", to="huggingface")
    calm_jax.save_frozen(composed.anchor, tmp_path / "anchor")
    composed.anchor = calm_jax.load(tmp_path / "anchor")
    calm_jax.export_bridge(composed, tmp_path / "bridge")
    with pytest.raises(CalmError, match="augment 0 reads items, such as images, which no command"):
        load_model(tmp_path / "bridge")
    with pytest.raises(CalmError, match="is a Hugging Face folder, not a frozen folder"):
        calm_jax.load(folder)
