"""Engines with experts: TensorRT takes their form, and what it builds multiplies in few bits."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from ditq.errors import DitqError
from ditq.export import Engine, model_agreement, site_agreement
from ditq.export.plans.make import make_plans
from ditq.export.plans.proof import prove
from ditq.export.targets.torch import rebuild
from tests.export.quantized import engine_of, shallow_model, with_experts
from tests.export.test_plans import sizes_for
from tests.families_small import small_inputs


@pytest.mark.parametrize(("family", "choice"), [("flux", "token"), ("dit", "expert")])
def test_a_plan_of_experts_multiplies_every_expert_in_few_bits(family: str, choice: str, tmp_path: Path) -> None:
    engine = engine_of(with_experts(family, choice), tmp_path / "engine", target_name="tensorrt")
    assert sum(".experts." in entry.site for entry in engine.planned) == 8
    engine, _ = make_plans(engine, ("sm89",), sizes_for(engine))
    for proof in prove(Engine.open(engine.folder)).values():
        assert proof.complete, str(proof)
    # With half precision in front of it a router may decide near ties otherwise, so layers are compared, each on its own input.
    assert max(site_agreement(engine, small_inputs(shallow_model(family))).values()) < 1e-3
    graph = onnx.load(str(engine.folder / "model.onnx"), load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul" and "router" in node.name]
    assert len(products) == 1 and makers[products[0].input[0]].op_type != "Cast"


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown kind": ({"kind": "magic"}, "parts of kind 'magic' are not known"),
    "place that is not there": ({"place": "transformer_blocks.9.ff"}, "do not fit"),
    "place of something else": ({"place": "pos_embed"}, "do not fit"),
    "spec without a key": ({"spec": {"experts": 4}}, "do not fit"),
    "spec that is no mapping": ({"spec": 7}, "do not fit"),
    "more channels than there are": ({"spec": {"experts": 100_000}}, "do not fit"),
    "other number of channels": (
        {"spec": {"form": {"inputs": ["net.0.proj"], "output": "net.2", "hidden": 7}}},
        "do not fit",
    ),
    "other linears": ({"spec": {"form": {"inputs": ["net.1"], "output": "net.0", "hidden": 256}}}, "do not fit"),
    "no kind": ({"kind": None}, "damaged"),
}


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_tokens_that_are_alike_go_to_the_same_experts_in_every_runtime(choice: str, tmp_path: Path) -> None:
    """As those of a padded text are: of equal scores the first count, in the graph and in torch."""
    engine = engine_of(with_experts("flux", choice), tmp_path / "engine")
    inputs = small_inputs(shallow_model("flux"))
    text = inputs["encoder_hidden_states"]
    agreement = model_agreement(engine, {**inputs, "encoder_hidden_states": text[:, :1].expand_as(text).contiguous()})
    assert agreement.holds, str(agreement)


@pytest.fixture(scope="module")
def engine_with_experts(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_of(with_experts("dit", "token"), tmp_path_factory.mktemp("experts") / "engine")


@pytest.mark.parametrize("case", DAMAGED)
def test_an_engine_with_damaged_experts_is_refused_in_one_line(case: str, engine_with_experts: Engine) -> None:
    change, says = DAMAGED[case]
    manifest = copy.deepcopy(dict(engine_with_experts.manifest))
    (part,) = manifest["structure"]["structural"]
    whole = case == "spec without a key" or not isinstance(change.get("spec", {}), dict)
    part |= change if whole or "spec" not in change else {"spec": {**part["spec"], **change["spec"]}}
    if change.get("kind", "") is None:
        del part["kind"]
    folder = engine_with_experts.folder.with_name(case.replace(" ", "-"))
    shutil.copytree(engine_with_experts.folder, folder)
    (folder / "engine.json").write_text(json.dumps(manifest))
    with pytest.raises(DitqError, match=says) as error:
        rebuild(Engine.open(folder))
    assert "\n" not in str(error.value)
