"""The admission gate: models that onnx itself wrote, models an attacker would write, and bytes nobody wrote."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import limits, onnx_fields, onnx_gate
from shared.errors import InvalidValue

onnx: Any = pytest.importorskip("onnx")
helper: Any = onnx.helper
FLOAT = 1


def tensor(name: str, *, external: bool = False) -> Any:
    made = helper.make_tensor(name, FLOAT, [2], [1.0, 2.0])
    if external:
        made.ClearField("float_data")
        entry = made.external_data.add()
        entry.key, entry.value = "location", "/etc/passwd"
        made.data_location = onnx.TensorProto.EXTERNAL
    return made


def graph(*nodes: Any, initializers: tuple[Any, ...] = ()) -> Any:
    return helper.make_graph(
        list(nodes) or [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 2])],
        list(initializers) or [tensor("w")],
    )


def model(made: Any = None, *, opsets: tuple[tuple[str, int], ...] = (("", 18),), **fields: Any) -> Any:
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets]
    return helper.make_model(made if made is not None else graph(), opset_imports=imports, **fields)


def nested(depth: int) -> Any:
    """A graph with an If in an If …, so deep."""
    made = graph()
    for _ in range(depth - 1):
        made = graph(helper.make_node("If", ["c"], ["y"], then_branch=made, else_branch=graph()))
    return made


def refusal(made: Any) -> str:
    with pytest.raises(InvalidValue) as caught:
        onnx_gate.check_onnx(made if isinstance(made, bytes) else made.SerializeToString())
    assert caught.value.code == "model.admission"
    assert caught.value.hint
    return caught.value.message


def test_an_ordinary_model_is_read_as_onnx_reads_it() -> None:
    made = model()
    summary = onnx_gate.check_onnx(made.SerializeToString())
    assert summary.ir_version == made.ir_version
    assert summary.opsets == {"": 18}
    assert summary.operators == {"": {"Add": 1}}
    assert (summary.nodes, summary.depth, summary.functions) == (1, 1, 0)
    assert summary.inputs == (onnx_gate.OnnxValue(name="x", elem_type=FLOAT, shape=(-1, 2)),)
    assert summary.outputs == (onnx_gate.OnnxValue(name="y", elem_type=FLOAT, shape=(-1, 2)),)
    assert summary.initializer_bytes == len(made.graph.initializer[0].SerializeToString())
    assert onnx_gate.inspect_onnx(memoryview(bytearray(made.SerializeToString()))) == summary


def test_an_input_with_an_initializer_is_not_asked_of_callers() -> None:
    made = model()
    made.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [2]))
    assert [value.name for value in onnx_gate.inspect_onnx(made.SerializeToString()).inputs] == ["x"]


def test_subgraphs_are_counted_and_bounded() -> None:
    summary = onnx_gate.check_onnx(model(nested(limits.MAX_GRAPH_DEPTH)).SerializeToString())
    assert summary.depth == limits.MAX_GRAPH_DEPTH
    assert summary.operators[""] == {"If": limits.MAX_GRAPH_DEPTH - 1, "Add": limits.MAX_GRAPH_DEPTH}
    assert "nest" in refusal(model(nested(limits.MAX_GRAPH_DEPTH + 1)))


def attributed(**attributes: Any) -> Any:
    return model(graph(helper.make_node("Constant", [], ["y"], **attributes)))


def sparse(*, external: str) -> Any:
    values, indices = tensor("v", external=external == "values"), tensor("i", external=external == "indices")
    return helper.make_sparse_tensor(values, indices, [4])


def in_function() -> Any:
    node = helper.make_node("Constant", [], ["y"], value=tensor("f", external=True))
    function = helper.make_function("", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 18)])
    return model(functions=[function])


def in_training() -> Any:
    made = model()
    made.training_info.add().algorithm.CopyFrom(graph(initializers=(tensor("w", external=True),)))
    return made


def sparse_initializer() -> Any:
    made = model()
    made.graph.sparse_initializer.append(sparse(external="values"))
    return made


def flag_only() -> Any:
    made = model()
    made.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    return made


def entry_only() -> Any:
    made = model()
    made.graph.initializer[0].external_data.add().key = "location"
    return made


def listed_attribute(field: str, value: Any) -> Any:
    made = attributed(value=tensor("t"))
    attribute = made.graph.node[0].attribute.add()
    attribute.name = "listed"
    getattr(attribute, field).append(value)
    return made


@pytest.mark.parametrize(
    "made",
    [
        model(graph(initializers=(tensor("w", external=True),))),
        flag_only(),
        entry_only(),
        attributed(value=tensor("t", external=True)),
        attributed(sparse_value=sparse(external="values")),
        attributed(sparse_value=sparse(external="indices")),
        listed_attribute("tensors", tensor("t", external=True)),
        listed_attribute("sparse_tensors", sparse(external="values")),
        listed_attribute("graphs", graph(initializers=(tensor("w", external=True),))),
        sparse_initializer(),
        model(
            graph(helper.make_node("If", ["c"], ["y"], then_branch=graph(initializers=(tensor("w", external=True),))))
        ),
        in_function(),
        in_training(),
    ],
)
def test_external_data_is_found_wherever_it_hides(made: Any) -> None:
    assert onnx_gate.inspect_onnx(made.SerializeToString()).external
    assert "another file" in refusal(made)


def test_operators_are_admitted_by_domain_and_name() -> None:
    def of(operator: str, domain: str) -> Any:
        return model(
            graph(helper.make_node(operator, ["x"], ["y"], domain=domain)), opsets=(("", 18), (domain or "ai.onnx", 1))
        )

    for operator, domain in (
        ("Relu", "ai.onnx"),
        ("QLinearAdd", "com.microsoft"),
        ("DequantizeLinear", "com.microsoft"),
    ):
        onnx_gate.check_onnx(of(operator, domain).SerializeToString())
    for operator, domain in (("PyOp", "com.microsoft"), ("TreeEnsembleClassifier", "ai.onnx.ml"), ("X", "evil")):
        assert "is not admitted" in refusal(of(operator, domain))


def test_an_operator_deep_inside_is_held_against_the_same_list() -> None:
    inner = graph(helper.make_node("X", ["x"], ["y"], domain="evil"))
    assert "evil" in refusal(model(graph(helper.make_node("If", ["c"], ["y"], else_branch=inner))))


def test_functions_training_and_bare_models_are_refused() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    function = helper.make_function("", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 18)])
    assert "functions" in refusal(model(functions=[function]))
    trained = model()
    trained.training_info.add()
    assert "training" in refusal(trained)
    assert "operator set" in refusal(model(opsets=(("com.microsoft", 1),)))
    bare = model()
    del bare.graph.node[:]
    assert "nodes" in refusal(bare)
    silent = model()
    del silent.graph.output[:]
    assert "no outputs" in refusal(silent)


def test_too_many_nodes_are_not_even_counted_to_the_end() -> None:
    node = helper.make_node("Relu", ["x"], ["y"]).SerializeToString()
    entry = b"\x0a" + bytes([len(node)]) + node
    body = entry * (limits.MAX_GRAPH_NODES + 1)
    assert "nodes" in refusal(b"\x3a" + length(len(body)) + body)


def test_work_is_bounded_by_fields_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_fields, "MAX_FIELDS", 1000)
    assert "fields" in refusal(b"\x08\x01" * 1001)


def length(size: int) -> bytes:
    out = bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*out, size])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x08",
        b"\x08\x80",
        b"\x08" + b"\xff" * 11,
        b"\x3a\x05ab",
        b"\x3a" + length(2**60),
        b"\x3b\x3c",  # a group
        b"\x38\x01",  # a graph as a number
        b"\x3a\x00\x3a\x00",  # two graphs
        b"\x3a\x06\x0a\x04\x22\x02\xff\xfe",  # an operator that is not text
        b"\x3a\x08\x0a\x06\x22\x01A\x22\x01B",  # two operators in one node
        b"PK\x03\x04" + b"\0" * 50,
        b"not a model at all",
    ],
)
def test_what_is_no_model_is_refused(data: bytes) -> None:
    refusal(data)


def rich() -> bytes:
    made = model(nested(3), opsets=(("", 18), ("com.microsoft", 1)))
    made.graph.sparse_initializer.append(sparse(external=""))
    made.graph.node.append(helper.make_node("Constant", [], ["z"], value=tensor("t"), doc_string="é"))
    data: bytes = made.SerializeToString()
    return data


def test_thousands_of_damaged_models_are_read_or_refused() -> None:
    rng = random.Random(5)
    good = rich()
    onnx_gate.check_onnx(good)
    refused = 0
    for _ in range(4000):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    del data[place : place + rng.randrange(1, 12)]
                    data = data or bytearray(b"\x08")
                case 2:
                    data[place:place] = rng.randbytes(rng.randrange(1, 9))
                case _:
                    data[place] ^= 1 << rng.randrange(8)
        try:
            onnx_gate.check_onnx(bytes(data))
        except InvalidValue as error:
            assert error.code == "model.admission"
            refused += 1
    assert 1000 < refused < 4000


def test_what_onnx_reads_as_external_is_never_admitted() -> None:
    """Against the real parser: whenever it finds external data in a damaged model, the gate has refused the file."""
    rng = random.Random(6)
    good = model(graph(initializers=(tensor("w", external=True), tensor("v")))).SerializeToString()
    parsed = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.choice([1, 2, 3])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        made = onnx.ModelProto()
        try:
            made.ParseFromString(bytes(data))
        except Exception:  # the real parser refuses with errors of its own
            continue
        parsed += 1
        if any(t.data_location == 1 or t.external_data for t in made.graph.initializer):
            with pytest.raises(InvalidValue):
                onnx_gate.check_onnx(bytes(data))
    assert parsed > 300


def test_an_external_flag_that_parsers_cut_to_size_is_seen() -> None:
    made = flag_only()
    good = made.SerializeToString()
    flag = b"\x70\x01"
    assert good.count(flag) == 1
    place = good.index(flag)
    # The lengths around it grow by four, and each of them stays below 128.
    data = bytearray(good[:place] + b"\x70\x81\x80\x80\x80\x10" + good[place + 2 :])
    tensor_at = good.index(made.graph.initializer[0].SerializeToString()) - 1
    graph_at = good.index(made.graph.SerializeToString()) - 1
    for at in (tensor_at, graph_at):
        data[at] += 4
    assert onnx.ModelProto.FromString(bytes(data)).graph.initializer[0].data_location == 1
    assert "another file" in refusal(bytes(data))


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        onnx_gate.inspect_onnx(data)
    except InvalidValue as error:
        assert error.code == "model.admission"
