"""Does an engine compute what its layers mean? Each quantized linear of the running graph against plain torch.

Both are given the input that the engine itself computed there. Over a whole model the two part ways by far more than
the sum of these errors: rounding an activation is a step, a last-bit difference in front of it now and then moves a
whole step, and later layers multiply such flips. Torch does the same to itself when its input moves by 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import torch
from safetensors.torch import load_file

from ditq.export.arguments import flatten
from ditq.export.engine import GRAPH, Engine
from ditq.export.session import open_session, session_options
from ditq.export.weights_file import WEIGHTS
from ditq.nn import QuantLinear
from ditq.nn.call_timestep import ARGUMENT

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # for a graph that is given as bytes


def site_agreement(engine: Engine, inputs: Mapping[str, Any]) -> dict[str, float]:
    """||engine - torch|| / ||torch|| of the output of each quantized linear, by site, both on the engine's own input.

    Args:
        inputs: arguments of the transformer, tensors or nested dictionaries of them, as in `to_onnx`.
    """
    names = [name for entry in engine.planned for name in (entry.input, entry.output)]
    values = _values(engine, list(dict.fromkeys(names)), inputs)
    stored = load_file(engine.folder / WEIGHTS)
    errors = {}
    for entry in engine.planned:
        prefix = f"{entry.site}."
        state = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
        layer = QuantLinear.from_spec(engine.sites[entry.site], state)
        layer.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
        layer.timestep = inputs.get(ARGUMENT)
        expected = layer(values[entry.input])
        difference = torch.linalg.vector_norm(values[entry.output] - expected)
        errors[entry.site] = float(difference / torch.linalg.vector_norm(expected).clamp_min(1e-30))
    return errors


def _values(engine: Engine, names: list[str], inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What the graph computes at those values: a session that gives them out beside the sample."""
    model = onnx.load(str(engine.folder / GRAPH), load_external_data=False)
    given = {value.name for value in (*model.graph.output, *model.graph.input)}
    for name in names:
        if name not in given:
            model.graph.output.add().name = name
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in flatten(inputs)[0].items()}
    options = session_options(threads=1)
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(engine.folder.resolve()))
    session = open_session(model.SerializeToString(), options)
    wanted = [name for name in names if name not in tensors]
    results = session.run(wanted, {value.name: tensors[value.name] for value in session.get_inputs()})
    values = {name: torch.from_numpy(array) for name, array in zip(wanted, results, strict=True)}
    return values | {name: torch.from_numpy(tensors[name]) for name in names if name in tensors}
