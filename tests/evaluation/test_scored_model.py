"""Models that lie in one place, one after another, are told from each other."""

import shutil

import pytest
import tiny_models
from etils import epath
from flax import nnx

import calm_jax
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.errors import CalmError
from calm_jax.evaluation.scored_model import scored_model
from calm_jax.evaluation.variants import Variant


def frozen(folder, seed=0, vocabulary="bytes"):
    decoder = tiny_models.decoder(vocab_size=300, seed=seed)
    calm_jax.save_frozen(decoder, folder, vocabulary=load_vocabulary(vocabulary))
    return epath.Path(folder)


def test_frozen_folders_differ_by_weights_and_by_vocabulary(tmp_path):
    first = frozen(tmp_path / "first")
    assert scored_model(first) == scored_model(frozen(tmp_path / "same"))
    others = [
        frozen(tmp_path / "weights", seed=1),
        frozen(tmp_path / "vocabulary", vocabulary="key_value/tiny"),
    ]
    for other in others:
        assert scored_model(other) != scored_model(first)
        # So do the second models of a baseline.
        mixed = [Variant(mix=str(folder)).described()["other"] for folder in (first, other)]
        assert mixed[0] != mixed[1]


def test_a_bridge_is_told_from_one_that_takes_its_place(tmp_path):
    models = [calm_jax.load(frozen(tmp_path / str(seed), seed)) for seed in range(2)]
    config = calm_jax.CompositionConfig(connections=((1, 1),))
    found = []
    for seed in range(2):
        composed = calm_jax.compose(*models, config, rngs=nnx.Rngs(seed))
        calm_jax.export_bridge(composed, tmp_path / "bridge")
        found.append(scored_model(epath.Path(tmp_path / "bridge")))
        shutil.copytree(tmp_path / "bridge", tmp_path / f"copy {seed}")
        shutil.rmtree(tmp_path / "bridge")
    assert found[0] != found[1]
    assert scored_model(epath.Path(tmp_path / "copy 0")) == found[0]


def test_only_a_run_has_steps(tmp_path):
    with pytest.raises(CalmError, match=r"--step=3: .* is a frozen folder, which has no check"):
        scored_model(frozen(tmp_path / "model"), step=3)
