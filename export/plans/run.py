"""Run an engine's plans on this machine's GPU: inputs and outputs are torch tensors, bound where they lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ditq.errors import DitqError
from ditq.export.engine import TEXT_GRAPH, Engine
from ditq.export.plans.library import Library, libraries, present_gpu
from ditq.export.plans.sizes import told_by_positions
from ditq.export.targets import USUAL, Runner, RunOptions
from ditq.export.text_cache import TextCache
from ditq.nn.call_timestep import ARGUMENT
from ditq.numerics.token_layout import sides


def _kernel_cache(digest: str) -> Path:
    """Where what TensorRT for RTX compiles for this very GPU at the first run is kept: for the user, not in the engine."""
    return user_cache() / "tensorrt" / f"{digest}.kernels"


def user_cache() -> Path:
    """Where ditq keeps for a user what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditq"


def available() -> tuple[bool, str]:
    """Whether there is a TensorRT and a GPU that it can use."""
    known = libraries()
    if not known:
        return False, "no TensorRT is installed; pip install tensorrt-rtx-cu13, or tensorrt"
    names = " and ".join(map(str, known))
    try:
        gpu = present_gpu()
    except DitqError as error:
        return False, f"{names} builds plans here, but cannot run them: {error}"
    return True, f"{names} on {gpu}"


def plan_here(engine: Engine) -> tuple[Library, Mapping[str, Any]]:
    """The library that is here, and the plan of the engine that it runs on this GPU.

    Raises:
        DitqError: no GPU or library, or the engine has no plan of this kind of GPU and this version.
    """
    gpu, known = present_gpu(), libraries()
    if not known:
        raise DitqError("no TensorRT is installed; pip install tensorrt-rtx-cu13, or tensorrt")
    for library in known:
        for plan in engine.plans:
            if (plan["gpu"], plan["library"], plan["version"]) == (gpu, library.name, library.version):
                return library, plan
    there = ", ".join(f"{plan['gpu']} with {plan['library']} {plan['version']}" for plan in engine.plans) or "nothing"
    raise DitqError(
        f"{engine.name}: has plans for {there}, but here are {gpu} and {' and '.join(map(str, known))}; "
        f"build one with: ditq plan {engine.folder} --gpu {gpu}"
    )


def runner(engine: Engine, options: RunOptions = USUAL) -> Runner:
    """Runs the engine's plans; that of the text, if there is one, once for a text. `options` are of no use to it.

    Raises:
        DitqError: there is no plan for what is here, or it cannot be loaded.
    """
    library, plan = plan_here(engine)
    loaded = {graph: _Plan(library, engine, plan, graph) for graph in engine.graphs}
    names = {} if engine.text is None else engine.text
    texts = TextCache(loaded[TEXT_GRAPH]) if names else None
    layout = told_by_positions(engine)
    check = TextCache(lambda inputs: check_picture(engine, plan, inputs))  # positions stay the same along a trajectory

    alone = Lock()  # a context runs one call at a time

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        with alone:
            if layout is not None and layout.positions is not None:
                check({layout.positions: inputs[layout.positions]})
            made = {} if texts is None else texts({name: inputs[name] for name in names["inputs"]})
            outputs = loaded[engine.graph_at(inputs.get(ARGUMENT))]({**inputs, **made})
            return outputs[engine.manifest["output"]]

    return run


def check_picture(engine: Engine, plan: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> None:
    """Raises DitqError for positions of another picture than the one that the plan was built for."""
    (positions,) = inputs.values()
    height, width = (int(size) for size in sides(positions[..., 1:3]))
    if [height, width] != plan["picture"]:
        rows, columns = plan["picture"]
        raise DitqError(
            f"{engine.name}: the picture of this call has {height} x {width} tokens, but its windows or linear attention were "
            f"planned for {rows} x {columns}; build another plan with: ditq plan {engine.folder} --gpu {plan['gpu']} "
            f"--sizes picture={height}x{width}"
        )


class _Plan:
    """One plan in memory, with its context."""

    def __init__(self, library: Library, engine: Engine, plan: Mapping[str, Any], graph: str) -> None:
        self._trt, self._name, self._sizes = library.module, f"{engine.name}: {plan['files'][graph]}", plan["sizes"]
        self._shapes = {entry["name"]: entry["shape"] for entry in engine.manifest["inputs"]}
        self._rebuild = f"ditq plan {engine.folder} --gpu {plan['gpu']}"
        self._said: list[str] = []
        path = engine.folder / plan["files"][graph]
        self._logger = library.logger(
            lambda severity, message: self._said.append(message) if "ERROR" in severity else None
        )
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise DitqError(
                f"{self._name}: {library} does not load it: {self._reason()}; build it again with: {self._rebuild}"
            )
        self._kernels = _kernel_cache(engine.files[plan["files"][graph]]["sha256"])
        self._cache: Any = None
        self._kept = False
        self._context = self._new_context()
        if self._context is None:
            raise DitqError(f"{self._name}: cannot be made ready to run: {self._reason()}")
        self._memory: Tensor | None = None
        self._stream = torch.cuda.Stream()
        tensors = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in tensors}
        self._inputs = [name for name in tensors if is_input[name]]
        self._outputs = [name for name in tensors if not is_input[name]]

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, on the GPU, for inputs wherever they are.

        Raises:
            DitqError: a size that the plan was not built for, or too little memory.
        """
        try:
            return self._run(given)
        except torch.cuda.OutOfMemoryError as error:
            free = torch.cuda.mem_get_info()[0] / 1e9
            raise DitqError(
                f"{self._name}: {free:.1f} GB free on the GPU are too little; use a smaller batch or resolution, or free some"
            ) from error

    def _run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        context, stream = self._context, self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            inputs = {name: given[name].to("cuda", non_blocking=True).contiguous() for name in self._inputs}
            for name, tensor in inputs.items():
                if not context.set_input_shape(name, tuple(tensor.shape)):
                    raise self._outside(name, tensor)
                context.set_tensor_address(name, tensor.data_ptr())
            outputs = {}
            for name in self._outputs:
                dtype = _TORCH[self._engine.get_tensor_dtype(name).name]
                outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
                context.set_tensor_address(name, outputs[name].data_ptr())
            self._give_memory()
            runs = context.execute_async_v3(stream.cuda_stream)
        caller = torch.cuda.current_stream()
        caller.wait_stream(stream)
        for tensor in inputs.values():  # their memory must not be given away before the plan has read it,
            tensor.record_stream(stream)
        for tensor in outputs.values():  # nor that of the outputs before the caller has
            tensor.record_stream(caller)
        if not runs:
            raise DitqError(f"{self._name}: cannot be run: {self._reason()}")
        self._keep_kernels()
        return outputs

    def _new_context(self) -> Any:
        """A context whose memory torch gives, and, with TensorRT for RTX, with the kernels of earlier runs."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._engine, "create_runtime_config"):
            return self._engine.create_execution_context(strategy)
        self._config = self._engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(strategy)
        if hasattr(self._config, "create_runtime_cache"):
            self._cache = self._config.create_runtime_cache()
            if self._kernels.is_file():
                self._cache.deserialize(self._kernels.read_bytes())
            self._config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(self._config)

    def _give_memory(self) -> None:
        """Room for the shapes of this call; more than before only where they need it."""
        size = self._context.update_device_memory_size_for_shapes()
        if self._memory is None or self._memory.numel() < size:
            self._memory = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
        self._context.set_device_memory(self._memory.data_ptr(), self._memory.numel())

    def _keep_kernels(self) -> None:
        """Write down what was compiled for this GPU, once; without a place for it the next process compiles again."""
        if self._cache is None or self._kept or self._kernels.is_file():
            return
        self._kept = True
        torch.cuda.synchronize()
        _write_if_possible(self._kernels, bytes(self._cache.serialize()))

    def _outside(self, name: str, tensor: Tensor) -> DitqError:
        for axis, size in zip(self._shapes.get(name, ()), tensor.shape, strict=False):
            if isinstance(axis, str) and not self._sizes[axis][0] <= size <= self._sizes[axis][2]:
                first, _, last = self._sizes[axis]
                return DitqError(
                    f"{self._name}: axis '{axis}' is {size} in {name}, but the plan takes {first} to {last}; build another "
                    f"with: {self._rebuild} --sizes {axis}={min(first, size)}:{size}:{max(last, size)}"
                )
        return DitqError(
            f"{self._name}: {name} has shape {list(tensor.shape)}, which the plan does not take: {self._reason()}"
        )

    def _reason(self) -> str:
        return self._said[-1].splitlines()[0] if self._said else "no reason was given"


_TORCH = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


def _write_if_possible(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
