"""The search: what is compiled, and what it settles on; and the formulas behind it."""

import copy
import dataclasses

import pytest

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, DecoderConfig
from calm_jax.planning import formula, search, topologies
from calm_jax.planning.ideal import ideal_flops
from calm_jax.presets import PRESETS
from calm_jax.training.configuration import composed_run, decoder_run

TOPOLOGY = topologies.find("v5e:2x2")
CONFIG = DecoderConfig.llama(
    vocab_size=512,
    embed_dim=64,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=128,
    dtype="bfloat16",
)


@pytest.fixture(scope="module", autouse=True)
def known_preset():
    PRESETS["small"] = CONFIG.to_dict()
    yield
    del PRESETS["small"]


@pytest.fixture
def config():
    return make_config()


@pytest.fixture(scope="module")
def found():
    return search.candidates(make_config(), TOPOLOGY)


def make_config():
    config = composed_run(CompositionConfig(every=2))
    config.name = "small"
    config.anchor, config.augments = "preset:small", ("preset:small",)
    config.data.train = ({"jsonl": "train.jsonl"},)
    config.data.length = 64
    config.train.batch_size = 8
    return config


def way(config):
    return (
        *(config.mesh[axis] for axis in ("data", "fsdp", "tensor")),
        config.train.accumulate,
        config.train.remat,
    )


def test_every_way_divides_the_chips_and_the_batch(config, found):
    ways = [way(each) for each, _ in found]
    assert len(set(ways)) == len(ways)
    for data, fsdp, tensor, accumulate, _ in ways:
        assert data * fsdp * tensor == 4
        assert config.train.batch_size % (data * fsdp * accumulate) == 0
    # Batch 8 on 4, 2 or 1 ways, in 2, 3 or 4 micro-batch sizes; meshes of as many ways.
    meshes = {4: 3, 2: 2, 1: 1}
    sizes = {4: 2, 2: 3, 1: 4}
    remats = len({remat for *_, remat in ways})
    assert remats == 4
    assert len(ways) == remats * sum(meshes[ways] * sizes[ways] for ways in meshes)
    times = [(each.train.remat == "offload", guess["seconds"]["serial"]) for each, guess in found]
    assert times == sorted(times)


def compiler(monkeypatch, found, fits, seconds, own=None):
    """A compiler that finds `fits` and `seconds` in turn, and the list of ways it was asked.

    Of the config's own way, which is asked for first, it finds `own` seconds; None: no such mesh.
    """
    monkeypatch.setattr(search, "candidates", lambda config, topology: copy.deepcopy(found))
    asked = []

    def compile_plan(config, topology):
        if config.mesh.data == -1:
            if own is None:
                raise CalmError("the mesh does not use all devices")
            guess = copy.deepcopy(found[0][1])
            guess["seconds"]["serial"] = own
            return guess | {"compiled": True, "remat": "the config's"}
        guess = copy.deepcopy(found[len(asked)][1])
        guess["memory"]["fits"] = fits[len(asked)]
        guess["seconds"]["serial"] = seconds[len(asked)]
        asked.append(way(config))
        return guess | {"compiled": True}

    return compile_plan, asked


def test_the_best_two_are_compiled_and_the_faster_is_told(config, found, monkeypatch):
    compile_plan, asked = compiler(monkeypatch, found, [True, True], [0.2, 0.1])
    best = search.cheapest(config, TOPOLOGY, compile_plan)
    expected = [way(each) for each, _ in found[:2]]
    assert asked == expected
    data, fsdp, tensor, accumulate, remat = expected[1]
    assert best["seconds"]["serial"] == 0.1
    assert (best["mesh"]["data"], best["accumulate"], best["remat"]) == (data, accumulate, remat)
    for flag in (
        f"--config.mesh.fsdp={fsdp}",
        f"--config.mesh.tensor={tensor}",
        f"--config.train.remat={remat}",
    ):
        assert flag in best["advice"]
    assert [each["compiled"] for each in best["candidates"][:3]] == [True, True, False]


@pytest.mark.parametrize("own, best", [(0.05, "the config's"), (0.3, "another")])
def test_the_configs_own_way_is_compiled_too(config, found, monkeypatch, own, best):
    compile_plan, _ = compiler(monkeypatch, found, [True, True], [0.2, 0.1], own)
    told = search.cheapest(config, TOPOLOGY, compile_plan)
    assert (told["remat"] == "the config's") == (best == "the config's")
    assert told["seconds"]["serial"] == min(own, 0.1)
    assert [each["compiled"] for each in told["candidates"][:4]] == [True, True, True, False]


def test_what_does_not_fit_after_all_is_passed_over(config, found, monkeypatch):
    compile_plan, asked = compiler(
        monkeypatch, found, [False, True, False, True], [0.1, 0.4, 0.1, 0.3]
    )
    best = search.cheapest(config, TOPOLOGY, compile_plan)
    assert len(asked) == 4
    assert best["seconds"]["serial"] == 0.3


def test_an_end_when_nothing_compiled_fits(config, found, monkeypatch):
    compile_plan, asked = compiler(monkeypatch, found, [False] * 4, [0.1] * 4)
    with pytest.raises(
        CalmError, match="4 ways that fit v5e:2x2 by formula were compiled, but none fits"
    ):
        search.cheapest(config, TOPOLOGY, compile_plan)
    assert len(asked) == 4


def test_an_end_before_compiling_when_no_formula_fits(config, monkeypatch):
    monkeypatch.setattr(search, "REMAT", ("full",))  # each kind is traced anew
    small = dataclasses.replace(TOPOLOGY.chip, hbm_bytes=1000)
    topology = dataclasses.replace(TOPOLOGY, chip=small)
    with pytest.raises(CalmError, match=r"no way of running the step fits on v5e:2x2"):
        search.cheapest(config, topology)
    assert "no way of running" in search.advice_by_formula(config, topology)


def test_formulas_count_what_a_step_must_do(config):
    compositions = [CompositionConfig(every=2)]
    expected = ideal_flops(CONFIG, [CONFIG], compositions, 8, 64)
    formulas = formula.Formula(config, TOPOLOGY)
    found = {}
    for remat in ("none", "full"):
        config.train.remat = remat
        found[remat] = formulas.plan(config, formula.mesh_of(config, TOPOLOGY))
        assert found[remat]["mfu_bound"] == pytest.approx(
            expected.total / (4 * TOPOLOGY.chip.flops * found[remat]["seconds"]["bound"])
        )
    assert 4 * found["none"]["flops"] == expected.total
    # The last product of a layer need not be computed again.
    assert expected.total < 4 * found["full"]["flops"] < expected.total_rematerialised


@pytest.mark.parametrize(
    "key, value, less",
    [
        ("train.remat", "full", "none"),
        ("train.accumulate", 2, 1),
    ],
)
def test_what_saves_memory_saves_it_in_the_formulas(config, key, value, less):
    config.data.length = 4096  # so that activations are most of it
    formulas = formula.Formula(config, TOPOLOGY)
    section, name = key.split(".")
    peaks = []
    for setting in (value, less):
        config[section][name] = setting
        peaks.append(formulas.plan(config, formula.mesh_of(config, TOPOLOGY))["memory"]["peak"])
    assert peaks[0] < 0.8 * peaks[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_slices_exchange_the_bridge_alone(config, accumulate):
    topology = topologies.find("v5e:2x2*2")
    formulas = formula.Formula(config, topology)
    config.train.batch_size, config.train.accumulate = 16, accumulate
    found = formulas.plan(config, formula.mesh_of(config, topology))
    (bridge,) = (tree for tree in found["memory"]["trees"] if tree["name"] == "bridge")
    # Each of the four chips has a quarter of the bfloat16 sum of its slice; of that each of two
    # slices sends half and gets the other half.
    quarter = 2 * bridge["parameters"] / 4
    assert found["seconds"]["network"] == pytest.approx(accumulate * quarter / 3.125e9)
    assert bridge["bytes"] == 4 * bridge["parameters"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_chips_exchange_the_gradients_of_a_decoder(accumulate):
    config = decoder_run(CONFIG)
    config.name, config.data.length = "small", 64
    config.train.batch_size, config.train.accumulate = 16, accumulate
    topology = topologies.find("h200:8")
    embeddings = 2 * CONFIG.vocab_size * CONFIG.embed_dim
    attention = 2 * (CONFIG.num_heads + CONFIG.num_kv_heads) * CONFIG.head_dim * CONFIG.embed_dim
    layers = CONFIG.num_layers * (attention + 3 * CONFIG.mlp_dim * CONFIG.embed_dim)
    gradients = 2 * layers + 4 * embeddings  # bytes; norms are next to nothing
    links = {}
    for axis in ("data", "fsdp"):
        config.mesh = {"data": 1, "fsdp": 1, "tensor": 1, axis: 8}
        found = formula.Formula(config, topology).plan(config, formula.mesh_of(config, topology))
        links[axis] = found["seconds"]["links"] * 450e9 / accumulate
    assert links["data"] == pytest.approx(2 * 7 / 8 * gradients, rel=0.01)
    # What is split is scattered once, and gathered forward and backward.
    assert links["fsdp"] == pytest.approx(7 / 8 * (gradients + 2 * 2 * layers), rel=0.01)
