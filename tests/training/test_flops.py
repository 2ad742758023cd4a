"""FLOPs of traced programs, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax import sharding
from calm_jax.models.attention_kernels import splash_attention
from calm_jax.training.flops import matmul_flops

B, D, F, T = 4, 16, 24, 32


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_of_matrices():
    assert matmul_flops(jnp.matmul, floats(B, D), floats(D, F)) == 2 * B * D * F
    flops = matmul_flops(
        lambda x, y: jnp.einsum("btd,bsd->bts", x, y), floats(B, T, D), floats(B, 2 * T, D)
    )
    assert flops == 2 * B * T * 2 * T * D


def test_a_scan_counts_as_often_as_it_runs():
    def layers(x, weights):
        def layer(x, weight):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ weight), None), x, length=3)[0], None

        return jax.lax.scan(layer, x, weights)[0]

    assert matmul_flops(layers, floats(B, D), floats(5, D, D)) == 5 * 3 * 2 * B * D * D


def test_a_gradient_costs_twice_its_forward_pass():
    """Two products for the middle weight, one for the first: its input needs no gradient."""

    def loss(weights, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ weights[0]) @ weights[1]))

    weights = (floats(D, F), floats(F, D))
    forward = 2 * B * D * F
    assert matmul_flops(loss, weights, floats(B, D)) == 2 * forward
    assert matmul_flops(jax.grad(loss), weights, floats(B, D)) == 2 * forward + 3 * forward


def test_compiled_functions_and_branches():
    product = jax.jit(jnp.matmul)

    def either(x, y):
        return jax.lax.cond(x[0, 0] > 0, lambda: product(x, y), lambda: x[:, :1] * y[:1])

    assert matmul_flops(either, floats(B, D), floats(D, F)) == 2 * B * D * F


@pytest.mark.parametrize("mesh", [{"data": 4, "tensor": 2}, {"data": 8}])
def test_a_function_of_one_devices_part(mesh):
    """Of all devices together; what is split by nothing, every device computes."""
    mesh = sharding.make_mesh(mesh)
    rows = jax.sharding.PartitionSpec("data", None)
    whole = jax.sharding.PartitionSpec()
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    flops = matmul_flops(product, floats(8 * B, D), floats(D, F))
    assert flops == 2 * 8 * B * D * F * mesh.shape["tensor"]


@pytest.mark.parametrize("backward", [False, True])
def test_a_kernel_counts_as_attention_of_the_full_square(backward):
    """Two products forward; backward those two again, the weights once more, and four of their own.

    What is counted is the grid's every block, those too that the causal mask skips.
    """
    shape = floats(B, 256, 2, 128)
    segments = jax.ShapeDtypeStruct((B, 256), jnp.int32)

    def attend(q, k, v, segments):
        return jnp.sum(
            splash_attention(q, k, v, segments, segments, scale=1.0, logit_cap=None, window=None)
        )

    function = jax.grad(attend, argnums=(0, 1, 2)) if backward else attend
    square = 2 * B * 256 * 256 * 2 * 128
    flops = matmul_flops(function, shape, shape, shape, segments)
    # Forward two products; backward four, and its own forward pass again, the weights twice.
    np.testing.assert_allclose(flops, (2 + 7 if backward else 2) * square, rtol=0.01)
