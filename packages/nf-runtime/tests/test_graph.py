"""A layer graph that cannot be run is refused when it is made."""

from typing import Any

import pytest

from nf_kernels.cost import CATEGORIES, Category
from nf_runtime.graph import Edge, LayerGraph, Operation, Rows
from nf_runtime.model_config import ConfigReader, ModelConfig
from nf_runtime.models import FAMILIES, Family, decoder_graph, layer_weights, model_weights

EDGES = {name: Edge(name, 8) for name in ("x", "y")}
MAKE_X = Operation("make_x", "embedding", writes={"out": "x"})
X_TO_Y = Operation("x_to_y", "linear", reads={"x": "x"}, writes={"out": "y"})
Y_TO_X = Operation("y_to_x", "linear", reads={"x": "y"}, writes={"out": "x"})


def graph(**parts: Any) -> LayerGraph:
    defaults: dict[str, Any] = {"edges": EDGES, "prologue": (), "layers": (), "epilogue": ()}
    return LayerGraph(**(defaults | parts))


def test_a_graph_in_order() -> None:
    made = graph(prologue=(MAKE_X,), layers=((X_TO_Y, Y_TO_X),) * 2, epilogue=(X_TO_Y,))
    assert len(made.layers) == 2
    assert X_TO_Y.rows is Rows.ALL
    assert X_TO_Y.category is Category.COMPUTE
    assert MAKE_X.category is Category.MEMORY


def test_an_unknown_operation() -> None:
    strange = Operation("strange", "convolution", writes={"out": "x"})
    with pytest.raises(
        ValueError, match="'strange' is of kind 'convolution'; expected one of"
    ) as e:
        graph(prologue=(strange,))
    assert all(repr(kind) in str(e.value) for kind in CATEGORIES)


@pytest.mark.parametrize(
    "parts",
    [
        {"prologue": (X_TO_Y,)},
        {"layers": ((X_TO_Y,),)},
        {"epilogue": (X_TO_Y,)},
        {"layers": ((X_TO_Y, MAKE_X),)},
        {"epilogue": (X_TO_Y,), "edges": {}},
    ],
)
def test_an_edge_that_is_read_before_it_is_written(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'x_to_y' reads edge 'x', which no operation before"):
        graph(**parts)


def test_an_edge_that_does_not_exist() -> None:
    away = Operation("away", "linear", reads={"x": "x"}, writes={"out": "z"})
    with pytest.raises(ValueError, match=r"'away' writes edge 'z', which is not among .*'x', 'y'"):
        graph(prologue=(MAKE_X, away))


def config_of(family: Family) -> ModelConfig:
    values = {
        "architectures": [family.architectures[0]],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 2,
    }
    return family.read_config(ConfigReader(values, "config.json"), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_is_a_graph_that_uses_all_its_weights(architecture: str) -> None:
    family = FAMILIES[architecture]
    config = config_of(family)
    made = decoder_graph(config)
    assert len(made.layers) == 2
    outside = {
        w for part in (made.prologue, made.epilogue) for op in part for w in op.weights.values()
    }
    assert outside == {spec.name for spec in model_weights(config)}
    for layer, operations in enumerate(made.layers):
        names = [operation.name for operation in operations]
        assert len(set(names)) == len(names)
        used = {weight for operation in operations for weight in operation.weights.values()}
        specs = layer_weights(config, family, layer)
        assert used == {spec.name for spec in specs}
        sources = [source.name for spec in specs for source in spec.sources]
        assert len(set(sources)) == len(sources)
        assert all(source.startswith(f"model.layers.{layer}.") for source in sources)
