"""What the benchmarks measure is what they say: the real step, and the same one in PyTorch."""

import pathlib
import subprocess
import sys

import jax
import pytest

# Tests compile much and compute little.
jax.config.update("jax_disable_most_optimizations", True)

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_a_step_needs_nothing_that_reads_data():
    """A machine that only measures has no TensorFlow."""
    code = (
        "import sys, step\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'seqio', 'grain', 'orbax', 'torch', 'clu'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_arguments_are_what_the_step_was_compiled_for():
    from pair import SIZES, RandomStep

    from calm_jax.sharding import make_mesh

    random = RandomStep(SIZES["tiny"], make_mesh({}, jax.devices()[:1]))
    arguments, abstract = random.arguments(), random.abstract()
    with jax.set_mesh(random.mesh):
        trainable, _, metrics = random.step(*arguments)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), trainable) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract[0]
    )
    # Random logits of unit variance: ln V + 1/2, and a little more or less.
    assert 3.5 < metrics["loss"] < 6
    assert metrics["grad_norm"] > 0


def test_pytorch_gives_the_same_loss_and_gradient():
    pytest.importorskip("torch")
    from pair import SIZES
    from pytorch import losses_and_gradients

    ours, careful, naive = losses_and_gradients(SIZES["tiny"])
    assert careful == pytest.approx(ours, rel=1e-5)
    assert naive == pytest.approx(ours, rel=1e-5)


def test_half_the_square_of_attention():
    """The whole square less the half: half of all attention, forward and backward."""
    from pair import SIZES

    pair = SIZES["tiny"]
    anchor, augment = pair.anchor, pair.augment
    # One connection, (3, 3): all four layers and the bridge forward, the bridge alone backward.
    heads = 4 * anchor.num_heads * anchor.head_dim + 4 * augment.num_heads * augment.head_dim
    bridge = 3 * anchor.embed_dim
    attention = 4 * pair.length * (heads + bridge) * pair.tokens
    assert pair.ideal().total - pair.ideal_causal() == attention // 2
