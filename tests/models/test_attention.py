"""Every backend of attention against XLA's: values, gradients, and what they see."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models  # noqa: F401  (compiles quickly)
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from calm_jax import sharding
from calm_jax.models import Inputs, attention, attention_kernels, chunked_attention
from calm_jax.models.attention import Attention

SHAPES = st.fixed_dictionaries(
    {
        "length": st.integers(1, 30),
        "heads": st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)]),
        "head_dim": st.sampled_from([1, 4, 8]),
        "window": st.none() | st.integers(1, 32),
        "local": st.booleans(),
        "logit_cap": st.sampled_from([None, 2.0]),
        "hidden_keys": st.booleans(),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "seed": st.integers(0, 99),
    }
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """As small as short rows need to have several."""
    monkeypatch.setattr(chunked_attention, "BLOCK", 8)
    monkeypatch.setattr(attention_kernels, "SPLASH_BLOCKS", (128,))
    interpreted = functools.partial(splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha", interpreted)


def arrays(length, heads, head_dim, dtype="float32", batch=2, seed=0, **_):
    """q, k, v and the result's gradient."""
    random = np.random.default_rng(seed)
    N, K = heads
    return [
        jnp.asarray(2 * random.normal(size=(batch, length, n, head_dim)), dtype)
        for n in (N, K, K, N)
    ]


def random_segments(length, hidden_keys, batch=2, seed=0, **_):
    """Any segments in any order, padding anywhere; and those of the keys, or None."""
    random = np.random.default_rng(seed)
    queries_BT = random.integers(0, 4, (batch, length), dtype=np.int32)
    queries_BT = np.where(random.random((batch, 1)) < 0.5, np.sort(queries_BT), queries_BT)
    keys_BS = np.where(random.random((batch, length)) < 0.5, queries_BT, 0)
    return queries_BT, (keys_BS if hidden_keys else None)


def sides(queries_BT, keys_BS=None, query_order_BT=None, key_order_BS=None):
    """Queries and keys, by their segments."""
    queries = Inputs(segments_BT=jnp.asarray(queries_BT), order_BT=query_order_BT)
    if keys_BS is None:
        return (queries,)
    return queries, Inputs(segments_BT=jnp.asarray(keys_BS), order_BT=key_order_BS)


def visible(queries_BT, keys_BS, window, query_order_BT=None, key_order_BS=None):
    """Bool [B, T, S] by the rule, one pair at a time."""
    allowed = np.zeros((*queries_BT.shape, keys_BS.shape[1]), bool)
    for b, t, s in np.ndindex(allowed.shape):
        same = queries_BT[b, t] == keys_BS[b, s] != 0
        query = t if query_order_BT is None else query_order_BT[b, t]
        key = s if key_order_BS is None else key_order_BS[b, s]
        allowed[b, t, s] = key <= query and same and (window is None or query - key < window)
    return allowed


def compare(backend, inputs, segments, local=True, tolerance=None, **fields):
    """Values and gradients of a backend are XLA's."""

    def values_and_gradients(backend, q, k, v, dx, local):
        attend = Attention(backend, *sides(*segments), scale=q.shape[-1] ** -0.5, **fields)
        x, backward = jax.vjp(lambda *inputs: attend(*inputs, local), q, k, v)
        return [x, *backward(dx)]

    @jax.jit
    def both(*inputs):
        return [values_and_gradients(name, *inputs) for name in (backend, "xla")]

    found, expected = both(*inputs, jnp.asarray(local))
    tolerance = tolerance or {"float32": 5e-6, "bfloat16": 2e-2}[inputs[0].dtype.name]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1, np.max(np.abs(theirs))))
    return found[0]


@hypothesis.settings(max_examples=8)
@hypothesis.given(shape=SHAPES)
def test_chunked_equals_xla(shape):
    segments = random_segments(**shape)
    fields = {name: shape[name] for name in ("window", "logit_cap", "local")}
    x_BTNH = compare("chunked", arrays(**shape), segments, **fields)
    queries_BT, keys_BS = segments
    window = shape["window"] if shape["local"] else None
    allowed = visible(queries_BT, queries_BT if keys_BS is None else keys_BS, window)
    assert np.all(np.asarray(x_BTNH)[~allowed.any(-1)] == 0)


@hypothesis.settings(max_examples=6)
@hypothesis.example(
    backend="xla", queries=1, keys=2, orders="queries", window=2, logit_cap=None, seed=0
)
@hypothesis.example(
    backend="xla", queries=4, keys=1, orders="none", window=1, logit_cap=None, seed=0
)
@hypothesis.given(
    backend=st.sampled_from(["xla", "chunked", "splash", "cudnn"]),
    queries=st.integers(1, 20),
    keys=st.integers(1, 20),
    orders=st.sampled_from(["none", "queries", "both"]),
    window=st.none() | st.integers(1, 9),
    logit_cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 99),
)
def test_queries_that_are_not_the_keys(backend, queries, keys, orders, window, logit_cap, seed):
    """Any number of either, in any order, by every backend: weights and values by numpy."""
    random = np.random.default_rng(seed)
    q, k, v = (random.normal(size=(2, n, 2, 4)).astype(np.float32) for n in (queries, keys, keys))
    segments = [random.integers(0, 3, (2, n), dtype=np.int32) for n in (queries, keys)]
    order = [random.integers(0, 25, (2, n), dtype=np.int32) for n in (queries, keys)]
    order = {"none": [None, None], "queries": [order[0], None], "both": order}[orders]
    attend = Attention(
        backend, *sides(*segments, *order), scale=0.5, window=window, logit_cap=logit_cap
    )
    hypothesis.assume(attend.backend != "cudnn")  # its program needs a GPU
    found = attend(*map(jnp.asarray, (q, k, v)), True)

    allowed = visible(*segments, window, *order)[:, None]
    logits = 0.5 * np.einsum("btnh,bsnh->bnts", q, k).astype(np.float64)
    logits = logits if logit_cap is None else logit_cap * np.tanh(logits / logit_cap)
    weights = np.where(allowed, np.exp(logits), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    expected = np.einsum("bnts,bsnh->btnh", weights, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    blind = ~allowed[:, 0].any(-1)
    assert np.all(np.asarray(found)[blind] == 0)


@pytest.mark.parametrize(
    ("window", "local", "heads", "head_dim", "logit_cap", "hidden_keys"),
    [
        (None, True, (2, 1), 64, None, True),
        (100, True, (4, 2), 128, 3.0, False),
        (100, False, (1, 1), 256, 3.0, True),
    ],
)
def test_splash_equals_xla(window, local, heads, head_dim, logit_cap, hidden_keys):
    inputs = arrays(256, heads, head_dim)
    segments = random_segments(256, hidden_keys)
    compare("splash", inputs, segments, local, 1e-5, window=window, logit_cap=logit_cap)


@pytest.mark.parametrize("length", [2, 5])
@pytest.mark.parametrize("logit_cap", [None, 2.0])
def test_a_few_queries_one_by_one_are_those_together(length, logit_cap, monkeypatch):
    q, k, v, dx = arrays(length, (4, 4), 8, seed=length)
    segments = random_segments(length, True, seed=length)

    def result(q, k, v):
        attend = Attention("xla", *sides(*segments), scale=0.5, logit_cap=logit_cap)
        x, weights = attend.with_weights(q, k, v)
        return jnp.sum(x * dx), weights

    found = []
    for many in (1, 1_000_000):
        monkeypatch.setattr(attention, "MANY", many)
        found.append(jax.value_and_grad(result, argnums=(0, 1, 2), has_aux=True)(q, k, v))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *found)


@pytest.mark.parametrize("window", [None, 5])
def test_cudnn_is_asked_for_the_same(window, monkeypatch):
    """JAX's own attention with the arguments that cuDNN gets, on rows with their padding last."""
    own = jax.nn.dot_product_attention

    def standing_in(*inputs, implementation, **fields):
        assert implementation == "cudnn"
        return own(*inputs, implementation="xla", **fields)

    monkeypatch.setattr(jax.nn, "dot_product_attention", standing_in)
    inputs = arrays(13, (4, 2), 8)
    segments_BT = np.array([[1] * 13, [1] * 9 + [0] * 4], np.int32)
    compare("cudnn", inputs, (segments_BT,), window=window)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_cudnn_decodes_the_same(heads, monkeypatch):
    """One query a row, and slots after it that hold what is left of a longer row."""
    own = jax.nn.dot_product_attention

    def standing_in(q, k, v, *, implementation, **fields):
        assert implementation == "cudnn" and k.shape[2] == 1
        return own(q, k, v, implementation="xla", **fields)

    monkeypatch.setattr(jax.nn, "dot_product_attention", standing_in)
    q, k, v, _ = arrays(11, heads, 8, batch=4)
    order_B1 = jnp.array([[0], [6], [10], [3]], jnp.int32)
    query = Inputs(segments_BT=jnp.array([[1], [1], [1], [0]]), order_BT=order_B1, packed=False)
    keys = Inputs(segments_BT=jnp.ones((4, 11), jnp.int32))
    ours, theirs = (
        Attention(backend, query, keys, scale=0.3)(q[:, :1], k, v) for backend in ("cudnn", "xla")
    )
    np.testing.assert_allclose(ours, theirs, atol=5e-6)
    assert np.all(ours[3] == 0) and np.any(ours[2] != 0)


@pytest.mark.parametrize("window", [None, 6])
def test_gradients_reach_what_is_visible_and_nothing_else(window):
    q, k, v, _ = arrays(21, (1, 1), 4)
    queries_BT, keys_BS = random_segments(21, hidden_keys=True, seed=3)
    attend = Attention("chunked", *sides(queries_BT, keys_BS), scale=0.5, window=window)

    @jax.jit
    def moved(k, v):
        jacobians = jax.jacrev(lambda k, v: attend(q, k, v, True).sum((2, 3)), (0, 1))(k, v)
        return [jnp.any(jacobian != 0, axis=(-2, -1)) for jacobian in jacobians]

    allowed = visible(queries_BT, keys_BS, window)
    rows = np.arange(2)
    by_key_BTS, by_value_BTS = (np.asarray(x)[rows, :, rows] for x in moved(k, v))
    np.testing.assert_array_equal(by_value_BTS, allowed)
    # A weight that is alone is 1 whatever its key.
    np.testing.assert_array_equal(by_key_BTS, allowed & (allowed.sum(-1, keepdims=True) > 1))


@pytest.mark.parametrize(("window", "ways"), [(20, 2), (21, 1), (4096, 1)])
def test_a_window_that_hides_nothing_is_not_computed_apart(window, ways):
    q, k, v, _ = arrays(21, (1, 1), 4)
    segments_BT = np.ones((2, 21), np.int32)

    def values(local):
        attend = Attention("chunked", *sides(segments_BT), scale=0.5, window=window)
        return attend(q, k, v, local)

    conditions = str(jax.make_jaxpr(values)(True)).count("cond[")
    assert conditions == ways - 1
    differ = np.any(values(True) != values(False))
    assert differ == (ways == 2)


# Key heads split over devices, one for each two devices, one for all, and cut across groups.
@pytest.mark.parametrize(
    ("backend", "heads"),
    [
        ("chunked", (8, 4)),
        ("chunked", (8, 2)),
        ("chunked", (4, 1)),
        ("chunked", (12, 3)),
        ("splash", (8, 2)),
    ],
)
def test_equals_xla_on_a_mesh(backend, heads):
    length = 21 if backend == "chunked" else 128
    inputs = arrays(length, heads, 8, batch=4)
    segments = random_segments(length, hidden_keys=False, batch=4)
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    axes = ("batch", "length", "heads", "head_dim")
    keys = ("batch", "length", "kv_heads", "head_dim")
    with jax.set_mesh(mesh):
        inputs = [
            jax.device_put(x, sharding.array_sharding("x", x.shape, x_axes, mesh))
            for x, x_axes in zip(inputs, (axes, keys, keys, axes), strict=True)
        ]
        x_BTNH = compare(backend, inputs, segments, True, 1e-5, window=9, logit_cap=5.0)
    assert x_BTNH.sharding.spec[2] == "tensor"
