"""load_engine: an engine as the diffusers transformer that it was compiled from.

transformer = load_engine("engine")
pipeline = FluxPipeline.from_pretrained(checkpoint, transformer=transformer, torch_dtype=transformer.dtype)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ditq.errors import DitqError
from ditq.export.arguments import collect, unflatten
from ditq.export.engine import Engine
from ditq.export.targets import USUAL, Runner, RunOptions, target
from ditq.given import check_whole
from ditq.nn.call_timestep import ARGUMENT
from ditq.nn.structural.ordered_tokens import OrderedTokens, other_order
from ditq.nn.structural.sparse_attention import SparseAttention, other_picture
from ditq.numerics.token_layout import TokenLayout

_ON_CPU = ("onnxruntime-cpu", "torch")
_ON_GPU = (
    "tensorrt",
    "onnxruntime-cuda",
)  # targets whose graphs are made for a GPU, which ditq's own kernels may run too
MOST_THREADS = 1 << 10
_WITHOUT_GRAPH = ("cuda", "torch")
# Argument -> how many classes it chooses from, by the config; diffusers' embeddings of them have one row more, for no class.
_CLASSES = {"class_labels": "num_embeds_ada_norm"}


def load_engine(
    path: str | Path, target: str = "auto", threads: int | None = None, decoded: bool = False
) -> EngineTransformer:
    """Open an engine folder, check it, and make it ready to run.

    Args:
        path: the engine folder.
        target: what runs it: `tensorrt`, `onnxruntime-cuda`, `onnxruntime-cpu`, `cuda`, `torch`, or `auto`: what it was
            compiled for, else, saying so, the first that can: of `cuda`, `onnxruntime-cuda`, `onnxruntime-cpu` and `torch` for
            an engine compiled for `tensorrt` or `onnxruntime-cuda`, of `onnxruntime-cpu` and `torch` for others with a graph,
            `torch` for those of `cuda`.
        threads: of ONNX Runtime; None leaves the choice to it.
        decoded: weights lie decoded in the GPU's memory, in 8 bits, instead of being decoded at each call: of target `cuda`.

    Raises:
        DitqError: not a sound engine (see `Engine.open`), `threads` below 1, or the target does not run here.
    """
    check_whole("threads", threads, 1, MOST_THREADS)
    return EngineTransformer(Engine.open(path), target, RunOptions(threads, decoded))


class EngineTransformer(ModelMixin):
    """Called like the diffusers transformer that it stands for. It has no parameters but an empty one; for inference."""

    def __init__(self, engine: Engine, target_name: str = "auto", options: RunOptions = USUAL) -> None:
        super().__init__()
        self.engine, self._options = engine, options
        self.target, self._run = _opened(engine, target_name, options)
        chosen = target(self.target)
        self._dtype, self._device = chosen.dtype, torch.device(chosen.device)
        self._config = FrozenDict(engine.config)
        # Offloading asks a module's first parameter where it is.
        self.nothing = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def config(self) -> FrozenDict:
        """The transformer's config, with its entries as attributes."""
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def call_signature(self) -> Signature:
        """That of the original's forward, of which some pipelines give the first arguments without their names."""
        names = self.engine.manifest["arguments"]
        return Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names])

    def __getattr__(self, name: str) -> Any:
        """A plain number of the original's, such as `inner_dim`, which some pipelines read beside its config."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            engine = self.__dict__.get("engine")  # none yet while it is made
            if engine is None or name not in engine.attributes:
                raise
            return engine.attributes[name]

    def to(self, *arguments: Any, **keywords: Any) -> EngineTransformer:  # type: ignore[override]
        """Stays where it is: inputs are brought to it and the output goes back to their device and dtype."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as where it lies, and opened anew from there."""
        return load_engine, (str(self.engine.folder.resolve()), self.target, *astuple(self._options))

    def __copy__(self) -> EngineTransformer:
        """Itself: nothing in it is to be changed."""
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> EngineTransformer:
        return self

    @contextmanager
    def cache_context(self, name: str, **of_the_step: Any) -> Iterator[None]:
        """Pipelines name their guidance branches by it, for step caches; an engine keeps nothing between calls."""
        yield

    def save_pretrained(self, *arguments: Any, **keywords: Any) -> None:
        """Raises DitqError: an engine is a folder that is copied as it is."""
        raise DitqError(f"{self.engine.folder}: an engine is not saved as a diffusers model; copy its folder instead")

    def forward(self, *arguments: Any, **keywords: Any) -> Transformer2DModelOutput | tuple[Tensor]:
        """The denoiser's output for the original transformer's own arguments.

        Raises:
            DitqError: an argument that the engine was not compiled for, a missing one, or a shape it cannot take.
        """
        names = self.engine.manifest["arguments"]
        if len(arguments) > len(names):
            raise DitqError(f"{self.engine.name}: takes at most {len(names)} arguments, not {len(arguments)}")
        given = dict(zip(names, arguments, strict=False))
        for name, value in keywords.items():
            if name not in names:
                raise DitqError(f"{self.engine.name}: has no argument '{name}'; its arguments are: {', '.join(names)}")
            if name in given:
                raise DitqError(f"{self.engine.name}: argument '{name}' is given twice")
            given[name] = value
        as_output = given.pop("return_dict", True)
        found = collect(given, self.engine.manifest["layout"], self.engine.name)
        check_picture(self.engine, given)
        check_labels(self.engine, given)
        inputs = _checked(found, self.engine.manifest["inputs"], self.engine.name, self._device)
        sample = _like(self._run(inputs), next(iter(found.values())))
        return Transformer2DModelOutput(sample=sample) if as_output else (sample,)


def engine_inputs(engine: Engine, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by flat name that the engine's graph takes, of the original transformer's keyword arguments.

    Raises:
        DitqError: as `EngineTransformer.forward` does.
    """
    found = collect(arguments, engine.manifest["layout"], engine.name)
    check_picture(engine, arguments)
    check_labels(engine, arguments)
    return _checked(found, engine.manifest["inputs"], engine.name)


def call_of(engine: Engine, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a call of the torch form with what the engine's graph takes, in the engine's dtypes.

    Raises:
        DitqError: no opened engine, and as `EngineTransformer.forward` does.
    """
    if not isinstance(engine, Engine):
        raise DitqError(f"engine is a {type(engine).__name__}; give Engine.open(...)")
    given = {name: value for name, value in arguments.items() if name != "return_dict"}
    return unflatten(engine_inputs(engine, given), engine.manifest["layout"])


def only_picture(engine: Engine) -> tuple[int, int] | None:
    """Rows and columns of image tokens of the pictures that an engine is for, where tiles that are seen were found before, or
    tokens put in order, for those only. None where it is for any."""
    found = _for_one_picture(engine)
    return None if found is None else found[0]


def _for_one_picture(engine: Engine) -> tuple[tuple[int, int], TokenLayout, Callable[..., str]] | None:
    """That picture; how to read a call's; and what to say of another, given both."""
    for part in engine.manifest["structure"].get("structural", []):
        spec = part["spec"]
        if part["kind"] == SparseAttention.kind and (given := spec.get("picture")):
            return (given[0], given[1]), TokenLayout.from_spec(spec["layout"]), other_picture
        if part["kind"] == OrderedTokens.kind:
            layout = TokenLayout.from_spec(spec["layout"])
            if layout.order is not None and layout.order.picture is not None:
                return layout.order.picture, layout, other_order
    return None


def check_picture(engine: Engine, arguments: Mapping[str, Any]) -> None:
    """Raises DitqError for a picture of another size than that which the engine is for."""
    found = _for_one_picture(engine)
    if found is not None:
        made_for, layout, said = found
        grid = layout.grid(arguments)
        if made_for != (grid.height, grid.width):
            raise DitqError(f"{engine.name}: {said(made_for, (grid.height, grid.width))}")


def check_labels(engine: Engine, arguments: Mapping[str, Any]) -> None:
    """Raises DitqError for a class that the model does not know, which a runtime would look up beyond the end of its table."""
    for name, classes in _CLASSES.items():
        given, known = arguments.get(name), engine.config.get(classes)
        if not isinstance(given, Tensor) or not isinstance(known, int):
            continue
        wrong = given[(given < 0) | (given > known)]
        if wrong.numel():
            knows = f"classes 0 to {known - 1}, and {known} for none"
            raise DitqError(f"{engine.name}: {name} holds {wrong[0].item()}, but the model knows {knows}")


def _opened(engine: Engine, name: str, options: RunOptions) -> tuple[str, Runner]:
    """(the target that runs the engine, its runner). `auto` is the engine's own target or else, said on standard error, the
    first of the others that runs it."""
    if name != "auto":
        _check_runs(name, engine, options)
        return name, target(name).runner(engine, options)
    own = engine.manifest["target"]
    reasons: dict[str, DitqError] = {}
    for candidate in (own, *(other for other in _others(engine) if other != own)):
        try:
            _check_runs(candidate, engine, options)
        except DitqError as error:
            reasons[candidate] = error
            continue
        try:
            run = target(candidate).runner(engine, options)
        except DitqError as error:
            if candidate == own and not target(own).plans:  # of which there may be none for what is here
                raise
            reasons[candidate] = error
            continue
        if candidate != own:
            why = "; ".join(map(str, reasons.values()))
            print(f"note: {why}; {engine.name} is run by {candidate} instead", file=sys.stderr)
        return candidate, run
    raise reasons[own]


def _others(engine: Engine) -> tuple[str, ...]:
    """What else may run the engine, the fastest first."""
    if not engine.graphs:
        return _WITHOUT_GRAPH
    return ("cuda", "onnxruntime-cuda", *_ON_CPU) if engine.manifest["target"] in _ON_GPU else _ON_CPU


def _check_runs(name: str, engine: Engine, options: RunOptions) -> None:
    """Raises DitqError if the target does not run here, or not so, or needs a graph that the engine does not have."""
    runs, why_not = target(name).available()
    if not runs:
        raise DitqError(f"target '{name}' does not run here: {why_not}")
    if options.decoded and not target(name).decodes:
        raise DitqError(f"target '{name}' holds weights in one form; decoded weights are of target 'cuda'")
    if target(name).lower is not None and not engine.graphs:
        made_for = engine.manifest["target"]
        raise DitqError(
            f"{engine.name}: was compiled for target '{made_for}' and holds no graph, which target '{name}' needs; "
            f"load it with target {' or '.join(_WITHOUT_GRAPH)}, or compile it with --target {name}"
        )


def _checked(
    tensors: Mapping[str, Tensor], described: list[dict[str, Any]], engine: str, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The inputs on the device and in the engine's dtypes, their shapes checked against its axes."""
    sizes: dict[str, tuple[int, str]] = {}
    inputs = {}
    for entry in described:
        name, shape = entry["name"], entry["shape"]
        if name not in tensors:
            raise DitqError(
                f"{engine}: engine.json is damaged (its 'layout' has no '{name}'); compile the engine again"
            )
        tensor = tensors[name]
        wanted = f"[{', '.join(map(str, shape))}]"
        if tensor.dim() != len(shape):
            raise DitqError(f"{engine}: {name} has shape {list(tensor.shape)}, but the engine takes {wanted}")
        for size, axis in zip(tensor.shape, shape, strict=True):
            if isinstance(axis, int) and size != axis:
                raise DitqError(f"{engine}: {name} has shape {list(tensor.shape)}, but the engine takes {wanted}")
            if isinstance(axis, str) and sizes.setdefault(axis, (size, name))[0] != size:
                first, where = sizes[axis]
                raise DitqError(f"{engine}: axis '{axis}' is {first} in {where} but {size} in {name}")
        dtype = getattr(torch, entry["dtype"])
        if tensor.is_floating_point() and not dtype.is_floating_point:
            _check_whole(tensor, dtype, name, engine)
        inputs[name] = tensor.detach().to(device, dtype).contiguous()
    return inputs


def _check_whole(tensor: Tensor, dtype: torch.dtype, name: str, engine: str) -> None:
    """Raise DitqError for numbers that would become others without a word where the engine takes whole ones."""
    changed = tensor[tensor.to(dtype).to(tensor.dtype) != tensor]
    if changed.numel():
        instead = "use a scheduler of whole timesteps, or compile it again" if name == ARGUMENT else "give such"
        kind = str(dtype).removeprefix("torch.")
        raise DitqError(f"{engine}: {name} holds {float(changed[0]):g}, but the engine takes {kind} there; {instead}")


def _like(sample: Tensor, given: Tensor) -> Tensor:
    dtype = given.dtype if given.is_floating_point() else sample.dtype
    return sample.to(given.device, dtype)
