"""Does an engine compute what its layers mean? The running graph against plain torch, layer by layer and as a whole.

`site_agreement` gives both the input that the engine itself computed at each layer. `model_agreement` compares the whole
model. Rounding an activation is a step there: a last-bit difference in front of a tie moves the integer by one, and later
layers multiply such flips, as torch's own do when its input moves by 1e-6. So the whole model agrees *up to ties*: every
integer of the engine must be a rounding of the torch value, to the left or to the right where that lies at a tie, and with
these integers taken over the outputs must be the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.export.engine import TEXT_GRAPH, Engine
from ditq.export.loader import call_of, engine_inputs
from ditq.export.lowering.four_bit import INPUT
from ditq.export.session import WEIGHTS_FOLDER, open_session, session_options
from ditq.export.targets import PlannedMatMul, RunOptions, target
from ditq.export.targets.torch import rebuild
from ditq.export.weights_file import WEIGHTS
from ditq.nn import AttentionRounding, QuantLinear, rounded_by
from ditq.nn.call_timestep import ARGUMENT
from ditq.numerics.activation_format import ActivationFormat
from ditq.numerics.attention_rounding import FLOAT8, INTEGER, PARTS, nearest, spacing
from ditq.numerics.carrier import FLOAT4, LARGEST_E4M3

TIE_TOLERANCE = 0.01  # steps: of 127, a relative error of 1e-4, a thousand times float32's own; seen are 1e-6 to 1e-4
HALF_TIE_TOLERANCE = 0.5  # steps: of 127, eight times float16's own 2^-11; seen are up to 0.38
OUTPUT_TOLERANCE = 1e-3
# A product in float16 rounds both sides and its result, 5e-4 of its size together; a hundred of them, as independent errors
# add up, make ten times that.
HALF_OUTPUT_TOLERANCE = 5e-3


@dataclass(frozen=True)
class ModelAgreement:
    """An engine against the torch meaning of its whole model, on the same inputs. Errors are ||a - b|| / ||b||.

    Attributes:
        integers: activations that are quantized, those that several linears share counted once a linear.
        flipped: integers of the engine other than torch's own at the same place, given the same integers before it.
        excess: the largest |x/s - q| - 1/2 over all integers q of the engine and torch values x: how far in steps a value
            lies on the other side of a tie. 0 where none does.
        worst: the site of that.
        error: of the output, torch having taken over the engine's integers.
        plain_error: of the output, each rounding for itself.
        invalid: by site, in the order of the run, integers farther than `tolerance` from being a rounding of the torch value;
            torch keeps its own.
        limit: what the error must be below.
    """

    integers: int
    flipped: int
    excess: float
    worst: str
    error: float
    plain_error: float
    tolerance: float = TIE_TOLERANCE
    invalid: Mapping[str, int] = field(default_factory=dict)
    limit: float = OUTPUT_TOLERANCE

    @property
    def holds(self) -> bool:
        """Every integer of the engine is a rounding of the torch value, and given them the outputs agree within the limit."""
        return not self.invalid and self.error < self.limit

    def __str__(self) -> str:
        if self.invalid:
            first, count = next(iter(self.invalid.items()))
            return (
                f"{sum(self.invalid.values())} of {self.integers} quantized activations are no rounding of the torch value, "
                f"the first {count} at {first}; off by up to {self.excess:.2g} of a step beyond a tie at {self.worst}"
            )
        return (
            f"output within {self.error:.0e} of torch up to ties ({self.plain_error:.0e} without): {self.flipped} of "
            f"{self.integers} roundings fall to the other side, the farthest {self.excess:.0e} of a step from its tie"
        )


@torch.no_grad()
def model_agreement(
    engine: Engine, inputs: Mapping[str, Any], tolerance: float | None = None, model: nn.Module | None = None
) -> ModelAgreement:
    """Run the engine's graph and the torch meaning of the whole model on the same inputs, and compare up to ties.

    The quantized activations of every layer are held in memory at once, a byte each. A graph whose own target does not run
    here is run by ONNX Runtime, which takes every target's.

    Args:
        inputs: keyword arguments of the transformer, such as those of a recorded call.
        tolerance: how far beyond a tie, in steps, a torch value may lie from what the engine's integer stands for; None: 0.01,
            or for graphs that multiply in half precision 0.5.
        model: the torch meaning where it is loaded already (`targets.torch.rebuild`).

    Raises:
        DitqError: the graph does not quantize its activations in a form that is known here, or cannot be run.
    """
    arguments = call_of(engine, inputs)
    model = rebuild(engine) if model is None else model
    own = target(engine.manifest["target"])
    tolerance = tolerance or (HALF_TIE_TOLERANCE if own.half else TIE_TOLERANCE)
    output = running_output(engine, arguments)
    places = _integers(engine, _graphs(engine, arguments))
    read = ((place.graph, value) for queue in places.values() for place in queue for value in place.values)
    names = list(dict.fromkeys(read))
    comparison = _Comparison(model, places, _values(engine, names, arguments), tolerance)
    with rounded_by(model, comparison.rounding):
        given = model(**arguments, return_dict=False)[0]
    comparison.check_all_used()
    plain = model(**arguments, return_dict=False)[0]
    return ModelAgreement(
        comparison.integers,
        comparison.flipped,
        max(comparison.excess, 0.0),
        comparison.worst,
        relative_difference(output, given),
        relative_difference(output, plain),
        tolerance,
        dict(comparison.invalid),
        HALF_OUTPUT_TOLERANCE if own.half else OUTPUT_TOLERANCE,
    )


def running_output(engine: Engine, arguments: Mapping[str, Any]) -> Tensor:
    """What the engine as it is computes, on its own target or else in ONNX Runtime: to give out values might change how the
    runtime fuses."""
    own = target(engine.manifest["target"])
    run = (own if own.available()[0] else target("onnxruntime-cpu")).runner(engine, RunOptions(threads=1))
    return run(engine_inputs(engine, arguments)).cpu()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64."""
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30))


def site_agreement(engine: Engine, inputs: Mapping[str, Any]) -> dict[str, float]:
    """||engine - torch|| / ||torch|| of the output of each quantized linear, by site, both on the engine's own input.

    Args:
        inputs: keyword arguments of the transformer.
    """
    arguments = call_of(engine, inputs)
    graphs = _graphs(engine, arguments)
    linears = [entry for entry in engine.planned if entry.numbers is None and entry.graph in graphs]
    names = [(entry.graph, name) for entry in linears for name in (*entry.read, entry.output, entry.rows) if name]
    values = _values(engine, list(dict.fromkeys(names)), arguments)
    stored = load_file(engine.folder / WEIGHTS)
    errors = {}
    for entry in linears:
        prefix = f"{entry.site}."
        state = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
        layer = QuantLinear.from_spec(engine.sites[entry.site], state)
        layer.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
        layer.timestep = arguments.get(ARGUMENT)
        x = torch.cat([values[entry.graph, name] for name in entry.read], dim=-1)
        if entry.rows is not None:
            x = x.flatten(0, -2)[values[entry.graph, entry.rows]]
        expected = layer(x)
        errors[entry.site] = relative_difference(values[entry.graph, entry.output], expected)
    return errors


@dataclass(frozen=True)
class _Place:
    """Where a graph of the engine holds what a layer's input, or a part of an attention, was rounded to: value - zero point,
    values by channels.
    """

    graph: str
    values: tuple[str, ...]
    zero_point: int


class _Comparison:
    """Hands the engine's integers to the layers of the torch model, and counts where they are not torch's own."""

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, Sequence[_Place]],
        values: Mapping[tuple[str, str], Tensor],
        tolerance: float,
    ) -> None:
        self._formats = {layer.site: layer.activation for layer in model.modules() if isinstance(layer, QuantLinear)}
        roundings = [module for module in model.modules() if isinstance(module, AttentionRounding)]
        self._numbers = {f"{found.site}/{part}": found.form.number for found in roundings for part in PARTS}
        self._numbers |= {site: FLOAT8 for site, form in self._formats.items() if form.grid == FLOAT8}
        self._left = {site: list(queue) for site, queue in places.items()}  # a layer that is called twice has two
        self._values, self._tolerance = values, tolerance
        self.integers = self.flipped = 0
        self.excess, self.worst = 0.0, ""
        self.invalid: dict[str, int] = defaultdict(int)

    def rounding(self, site: str, steps: Tensor) -> Tensor:
        """The engine's number where it is a rounding of `steps` up to the tolerance, else the nearest."""
        form, number = self._formats.get(site), self._numbers.get(site, INTEGER)
        if not self._left.get(site):  # a call whose output nothing reads, which the engine's graph is without
            return nearest(steps, number) if form is None else form.nearest(steps)
        place = self._left[site].pop(0)
        found = torch.cat([self._values[place.graph, value] for value in place.values], dim=-1)
        carriers = (found.to(steps.dtype) - place.zero_point).view(steps.shape)
        if form is not None and form.grid == FLOAT4.name:
            return self._in_blocks(site, steps, carriers, form)
        engine = form.rounded_from(carriers) if form is not None else carriers
        own = nearest(steps, number)
        gap = unit = spacing(steps, number)
        if form is not None and number == FLOAT8:
            # What differs in front is a share of the token's largest value, however close the FP8 numbers lie around zero.
            unit = gap.clamp_min(LARGEST_E4M3 / 127)
        excess = ((steps - engine).abs() - gap / 2) / unit
        return self._counted(site, engine, own, excess, engine == nearest(engine, number))

    def _in_blocks(self, site: str, steps: Tensor, engine: Tensor, form: ActivationFormat) -> Tensor:
        """The same for FP4 numbers times the scales of their blocks, which fall to one side or the other of a tie as well.

        Two such scales are at most an eighth apart, which moves a number by less than the tolerance; so none is held to the
        grid of torch's own.
        """
        gap = form.block_spacing(steps)
        # as for FP8: what differs in front is a share of the largest values
        excess = ((steps - engine).abs() - gap / 2) / gap.clamp_min(form.maximum / 127)
        return self._counted(site, engine, form.nearest(steps), excess, torch.ones_like(excess, dtype=torch.bool))

    def _counted(self, site: str, engine: Tensor, own: Tensor, excess: Tensor, on_grid: Tensor) -> Tensor:
        valid = (excess <= self._tolerance) & on_grid
        self.integers += engine.numel()
        self.flipped += int((engine != own).sum())
        largest = float(excess.max())
        if largest > self.excess:
            self.excess, self.worst = largest, site
        if not valid.all():
            self.invalid[site] += int((~valid).sum())
        return torch.where(valid, engine, own)

    def check_all_used(self) -> None:
        left = next((site for site, queue in self._left.items() if queue), None)
        if left is not None:
            raise DitqError(f"{left}: the torch model does not run this layer as often as the engine's graph does")


def _graphs(engine: Engine, inputs: Mapping[str, Any]) -> list[str]:
    """The graphs that one call runs."""
    others = [TEXT_GRAPH] if engine.text is not None else []
    return [engine.graph_at(inputs.get(ARGUMENT)), *others]


def _integers(engine: Engine, files: Sequence[str]) -> dict[str, list[_Place]]:
    """What the integer products of each layer with quantized activations read in these graphs, MatMul <- DequantizeLinear <-
    integers, and the numbers of each part of a rounded attention, by `<attention>/<part>`.
    """
    graphs = {name: onnx.load(str(engine.folder / name), load_external_data=False).graph for name in files}
    made = {name: {output: node for node in graph.node for output in node.output} for name, graph in graphs.items()}
    fixed = {name: {constant.name: constant for constant in graph.initializer} for name, graph in graphs.items()}
    places: dict[str, list[_Place]] = {site: [] for site in engine.sites}
    for entry in (entry for entry in engine.planned if entry.graph in graphs):
        makers, constants = made[entry.graph], fixed[entry.graph]
        for part, value in (entry.numbers or {}).items():
            maker = makers.get(value)
            if maker is None or (maker.op_type, len(maker.input)) not in (("QuantizeLinear", 3), ("Cast", 1)):
                raise DitqError(f"{engine.folder}: {part}: its numbers are not made in a known form")
            zero = int(numpy_helper.to_array(constants[maker.input[2]])) if len(maker.input) == 3 else 0
            places.setdefault(part, []).append(_Place(entry.graph, (value,), zero))
        if entry.kind == "float4":
            places[entry.site].append(_Place(entry.graph, (_fp4_numbers(makers, entry.product),), 0))
        if entry.numbers is None and _rounds_to_integers(engine, entry):
            read = [_read_by(makers, constants, product) for product in entry.coded]
            zero_points = {zero for _, zero in read}
            zero_point = zero_points.pop() if len(zero_points) == 1 else None
            if zero_point is None:
                raise DitqError(f"{engine.folder}: {entry.site}: its activations are not quantized in a known form")
            places[entry.site].append(_Place(entry.graph, tuple(value for value, _ in read), zero_point))
    return places


def _rounds_to_integers(engine: Engine, entry: PlannedMatMul) -> bool:
    """Whether a linear's product reads an input in 8 bits or fewer, as they are or widened."""
    rounded = engine.sites[entry.site]["activation"]["granularity"] != "none"
    return entry.kind in ("integer", "float8") or (entry.kind == "dequantized" and rounded)


def _fp4_numbers(makers: Mapping[str, onnx.NodeProto], product: str) -> str:
    """The FP4 numbers times block scales that a product reads, MatMul <- Cast <- FP4Input, which gives them out beside what
    they stand for."""
    node = makers[product]
    while node.op_type != INPUT:
        node = makers[node.input[0]]
    return str(node.output[1])


def _read_by(
    makers: Mapping[str, onnx.NodeProto], constants: Mapping[str, onnx.TensorProto], product: str
) -> tuple[str, int | None]:
    """(values, zero point) that a product reads: through a DequantizeLinear, or as they are; no zero point where there is
    neither."""
    node = makers.get(product)
    if node is None:
        return "", None
    whole = node.op_type == "MatMulInteger" and len(node.input) == 2
    value = node.input[0]
    while value in makers and makers[value].op_type in ("Reshape", "Transpose"):  # of groups, in front of one product
        value = makers[value].input[0]
    maker = makers.get(value)
    if whole and maker is not None and maker.op_type == "QuantizeLinear":
        return value, 0
    if maker is None or maker.op_type != "DequantizeLinear" or len(maker.input) < 3 or maker.input[2] not in constants:
        return "", None
    return maker.input[0], int(numpy_helper.to_array(constants[maker.input[2]]))


def _values(
    engine: Engine, places: Sequence[tuple[str, str]], inputs: Mapping[str, Any]
) -> dict[tuple[str, str], Tensor]:
    """What the graphs of the engine compute at those places, (graph, value)."""
    tensors = engine_inputs(engine, inputs)
    found: dict[tuple[str, str], Tensor] = {}
    for graph in reversed(_graphs(engine, inputs)):  # what the text's graph makes is read by the other
        made = engine.text["outputs"] if engine.text is not None and graph == TEXT_GRAPH else []
        names = [name for where, name in places if where == graph]
        values = _values_of(engine, graph, list(dict.fromkeys([*names, *made])), tensors)
        tensors |= {name: values[name] for name in made}
        found |= {(graph, name): value for name, value in values.items()}
    return found


def _values_of(engine: Engine, graph: str, names: list[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What one graph computes at those values: a session that gives them out beside its outputs."""
    model = onnx.load(str(engine.folder / graph), load_external_data=False)
    given = {value.name for value in (*model.graph.output, *model.graph.input)}
    float8 = _float8_values(model.graph)
    for name in names:
        if name in float8:  # which ONNX Runtime gives out to no one
            wide = onnx.helper.make_node("Cast", [name], [f"{name}/wide"], to=onnx.TensorProto.FLOAT)
            model.graph.node.append(wide)
        if name not in given:
            model.graph.output.add().name = f"{name}/wide" if name in float8 else name
    tensors = {name: tensor.numpy() for name, tensor in inputs.items()}
    options = session_options(threads=1)
    options.add_session_config_entry(WEIGHTS_FOLDER, str(engine.folder.resolve()))
    session = open_session(model.SerializeToString(), options)
    wanted = [name for name in names if name not in tensors]
    if not wanted:
        return {name: torch.from_numpy(tensors[name]) for name in names}  # for no names a session gives all outputs
    results = session.run(
        [f"{name}/wide" if name in float8 else name for name in wanted],
        {value.name: tensors[value.name] for value in session.get_inputs()},
    )
    values = {name: torch.from_numpy(array) for name, array in zip(wanted, results, strict=True)}
    return values | {name: torch.from_numpy(tensors[name]) for name in names if name in tensors}


def _float8_values(graph: onnx.GraphProto) -> set[str]:
    """What a QuantizeLinear makes in FP8."""
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {
        node.output[0]
        for node in graph.node
        if node.op_type == "QuantizeLinear" and kinds.get(node.input[2]) == onnx.TensorProto.FLOAT8E4M3FN
    }
