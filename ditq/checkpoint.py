"""Open a checkpoint: a pipeline folder, a transformer folder, one .safetensors file, or a built-in name such as `mini`.

Weights are read from safetensors alone, tensor by tensor when they are asked for; nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ditq.errors import DitqError
from ditq.families import CHANGING, Family, family_of
from ditq.given import name_of, path_of
from ditq.memory import free_memory, on_disk
from ditq.nn.float32_parts import cast, stays_in_float32
from ditq.quiet import quiet_libraries
from ditq.safetensors_files import TensorFile, TensorInfo, open_tensor_files

ASSETS = Path(__file__).parent / "assets"
# What diffusers' classes and conversions raise when the config or the tensors that they are given make no sense to them.
REFUSALS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
)
FLOATS = ("F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2")  # numbers that are weights by themselves
ONLY_IN_TILES = ("AutoencoderKLAllegro",)  # classes of VAEs that cannot decode a picture as a whole
# What other quantizers write beside their weights: scaled FP8, bitsandbytes, GPTQ and AWQ, SVDQuant, compressed-tensors.
QUANTIZED = re.compile(
    r"(^|[._])(scale_weight|weight_scale(_inv|_2)?|scale_input|input_scale|scaled_fp8|absmax|quant_map|quant_state\..*|qweight|qzeros"
    r"|wscales|weight_packed|weight_zero_point)$"
)
BUILT_IN = {"mini": ASSETS / "mini", "mini-pixart": ASSETS / "mini_pixart"}


@dataclass(frozen=True)
class Checkpoint:
    """A diffusion transformer on disk, opened but not loaded.

    Attributes:
        name: what the user called it.
        root: the pipeline folder, transformer folder or file.
        config: the transformer's config.json.
        class_name: its diffusers class.
        files: the safetensors files that hold its tensors.
        pipeline_root: the pipeline folder around it, or None for a transformer alone.
        sampling: default arguments of the pipeline call (sampling.json in the pipeline folder; empty where there is none).
        recorded: what recorded calls tell of it, where no family has its class (recorded_family.py).
    """

    name: str
    root: Path
    config: Mapping[str, Any]
    class_name: str
    files: tuple[TensorFile, ...]
    pipeline_root: Path | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    recorded: Family | None = None

    @classmethod
    def open(cls, path: str | Path, config: str | Path | None = None) -> Checkpoint:
        """Open `path`; `config` gives the config.json (or its folder) of a single file that carries none.

        Raises:
            DitqError: nothing there, no config, an unknown class, a damaged or incomplete set of files.
        """
        root = path_of("checkpoint", path)
        name = str(path)
        root = BUILT_IN.get(name, root.expanduser())
        if not root.exists():
            known = ", ".join(BUILT_IN)
            raise DitqError(f"{name}: no such checkpoint; give a folder, a .safetensors file, or one of: {known}")
        if root.is_file():
            return cls._open_file(name, root, config)
        index = root / "model_index.json"
        if index.exists():
            return cls._open_pipeline(name, root)
        return cls._open_folder(name, root, root)

    @classmethod
    def _open_pipeline(cls, name: str, root: Path) -> Checkpoint:
        index = read_json(root / "model_index.json")
        if "transformer" not in index:
            raise DitqError(f"{name}: model_index.json names no transformer; ditq compiles diffusion transformers only")
        folder = root / "transformer"
        if not folder.is_dir():
            raise DitqError(f"{name}: model_index.json names a transformer but there is no folder {folder.name}/ in it")
        sampling = root / "sampling.json"
        return cls._open_folder(name, root, folder, root, read_json(sampling) if sampling.exists() else {})

    @classmethod
    def _open_folder(
        cls, name: str, root: Path, folder: Path, pipeline_root: Path | None = None, sampling: Any = None
    ) -> Checkpoint:
        if not any(folder.iterdir()):
            raise DitqError(
                f"{name}: {name_of(folder)}/ is empty; a checkpoint needs a config.json and safetensors files"
            )
        path = folder / "config.json"
        if not path.exists():
            raise DitqError(
                f"{name}: no config.json in {name_of(folder)}/; give a diffusers pipeline or transformer folder"
            )
        config = read_json(path)
        files = tuple(open_tensor_files(folder, name))
        return cls(name, root, config, _class_name(config, name), files, pipeline_root, sampling or {})

    @classmethod
    def _open_file(cls, name: str, path: Path, config: str | Path | None) -> Checkpoint:
        if path.suffix != ".safetensors":
            raise DitqError(
                f"{name}: only .safetensors files are read (others can run code when opened); convert it first"
            )
        tensors = TensorFile.open(path)
        values: Any
        if config is not None:
            place = Path(config)
            values = read_json(place / "config.json" if place.is_dir() else place)
        elif "config" in tensors.metadata:
            values = _parse_json(tensors.metadata["config"], f"{name}: the config in the file's metadata")
        elif (path.parent / "config.json").exists():
            values = read_json(path.parent / "config.json")
        else:
            raise DitqError(f"{name}: a single file does not tell its class; give its config.json with --config")
        return cls(name, path, values, _class_name(values, name), (tensors,))

    @property
    def family(self) -> Family | None:
        """The family that the transformer's class belongs to, if ditq has a file for it; else what recorded calls tell."""
        return family_of(self.class_name) or self.recorded

    def told_by(self, recorded: Family) -> Checkpoint:
        """The same with what recorded calls tell; what was read of it, such as its fingerprint, is known already."""
        found = copy.copy(self)
        object.__setattr__(found, "recorded", recorded)
        return found

    @cached_property
    def _places(self) -> dict[str, TensorFile]:
        return {name: file for file in self.files for name in file.tensors}

    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor, from the headers alone."""
        return {name: file.tensors[name] for name, file in self._places.items()}

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(math.prod(info.shape) for info in self.tensors().values())

    @property
    def larger_than_memory(self) -> bool:
        """Would its weights in float32 take more than half of the memory that is free?"""
        return 4 * self.parameters > free_memory(torch.device("cpu")) // 2

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read now, in the dtype it is stored in."""
        if name not in self._places:
            raise DitqError(f"{self.name}: has no tensor {name}")
        return self._places[name].read(name)

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for file in self.files:
            with file.path.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over the config and every byte of the weights."""
        return self._fingerprint

    def model_class(self) -> type[nn.Module]:
        """The diffusers class of the transformer."""
        import diffusers

        found = getattr(diffusers, self.class_name, None)
        if found is None or not isinstance(found, type) or not issubclass(found, nn.Module):
            raise DitqError(
                f"{self.name}: the class {self.class_name} is not in diffusers {diffusers.__version__}; "
                "upgrade diffusers or correct _class_name in config.json"
            )
        return found

    def load_model(self, dtype: torch.dtype = torch.float32, offload: Path | None = None) -> nn.Module:
        """The transformer in `dtype`, but for what stays in float32 (float32_parts.py); for evaluation only, without gradients.
        It is in memory, or has its large tensors in the folder `offload` (memory.py); those of a single file in its authors'
        naming are in memory at first.

        Raises:
            DitqError: a missing tensor, a wrong shape, NaN or infinity in the weights.
            OSError: `offload` is full, or cannot be written.
        """
        self._check_not_quantized()
        model = self._empty_model()
        expected = model.state_dict()
        if self._in_original_names(expected):
            model = self._load_original_names(dtype)
            if offload is not None:
                for parameter in model.parameters():
                    parameter.data = on_disk(parameter.data, offload, parameter.dtype)
            return model
        self._check_against(expected)
        unexpected = sorted(set(self._places) - set(expected))
        if unexpected:
            warnings.warn(f"{self.name}: {len(unexpected)} tensors are not used, e.g. {unexpected[0]}", stacklevel=2)
        from accelerate.utils import set_module_tensor_to_device

        def wanted(name: str) -> torch.dtype:
            return torch.float32 if stays_in_float32(model, name) else dtype

        for name in expected:
            tensor = self._finite(name, self.read(name))
            kept_as = wanted(name) if tensor.is_floating_point() else tensor.dtype
            value = tensor.to(kept_as) if offload is None else on_disk(tensor, offload, kept_as)
            set_module_tensor_to_device(model, name, "cpu", value=value, dtype=value.dtype)
        for place, module in model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.to(wanted(f"{place}.{name}")))
        return model.eval().requires_grad_(False)

    @property
    def changing(self) -> tuple[str, ...]:
        """Arguments of the transformer's forward that change from step to step."""
        return CHANGING if self.family is None else self.family.changing

    def skeleton(self) -> nn.Module:
        """The transformer without its weights: right shapes, no memory. For looking at its structure only."""
        model = self._empty_model()
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = torch.zeros(()).expand(parameter.shape)  # one number, seen as the whole tensor
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
        return model.eval()

    def _empty_model(self) -> nn.Module:
        from accelerate import init_empty_weights

        builder: Any = self.model_class()
        try:
            with quiet_libraries(), init_empty_weights(include_buffers=False):
                return builder.from_config(dict(self.config))
        except REFUSALS as error:
            raise DitqError(f"{self.name}: {self.class_name} refuses its config.json: {_first_line(error)}") from error

    def check(self) -> None:
        """Raise DitqError for a missing tensor, a wrong shape, whole numbers or weights that are quantized already, by what the
        headers of the files say."""
        self._check_not_quantized()
        expected = self._empty_model().state_dict()
        if not self._in_original_names(expected):
            self._check_against(expected)

    def _in_original_names(self, expected: Mapping[str, torch.Tensor]) -> bool:
        # A few names, such as context_embedder's, are the same in both.
        return self.root.is_file() and 2 * len(set(expected) & set(self._places)) < len(expected)

    def _check_not_quantized(self) -> None:
        """Raise DitqError for weights that mean what they are only together with scales beside them."""
        for name in self._places:
            if QUANTIZED.search(name):
                raise DitqError(
                    f"{self.name}: {name} is a scale of weights that are quantized already; give the checkpoint before it was "
                    "quantized"
                )

    def _check_against(self, expected: Mapping[str, torch.Tensor]) -> None:
        for name, wanted in expected.items():
            if name not in self._places:
                raise DitqError(f"{self.name}: the tensor {name} that {self.class_name} needs is not in its files")
            info = self._places[name].tensors[name]
            if info.shape != tuple(wanted.shape):
                raise DitqError(
                    f"{self.name}: {name} has shape {list(info.shape)} but {self.class_name} with this config.json "
                    f"needs {list(wanted.shape)}"
                )
            if wanted.is_floating_point() != (info.dtype in FLOATS):
                needed = f"one of {', '.join(FLOATS)}" if wanted.is_floating_point() else "whole numbers"
                raise DitqError(
                    f"{self.name}: {name} is stored as {info.dtype}, but {self.class_name} needs {needed}; "
                    "give the checkpoint before it was quantized"
                )

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise DitqError(f"{self.name}: {name} holds NaN or infinity; the checkpoint is damaged or was overflowed")
        return tensor

    def _load_original_names(self, dtype: torch.dtype) -> nn.Module:
        """A single file in its authors' own naming goes through diffusers' conversion."""
        import tempfile

        builder: Any = self.model_class()
        if not hasattr(builder, "from_single_file"):
            raise DitqError(
                f"{self.name}: its tensor names are not {self.class_name}'s, and diffusers cannot convert them"
            )
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(dict(self.config)))
            weights = {name: self._finite(name, self.read(name)) for name in self._places}
            try:
                with quiet_libraries():
                    model = builder.from_single_file(weights, config=folder, torch_dtype=dtype, local_files_only=True)
            except (*REFUSALS, OSError, StopIteration) as error:
                raise DitqError(
                    f"{self.name}: neither {self.class_name}'s tensor names nor the original ones that diffusers "
                    f"converts: {_first_line(error)}"
                ) from error
        left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if left:
            raise DitqError(f"{self.name}: the tensor {left[0]} that {self.class_name} needs is not in the file")
        return cast(model, torch.device("cpu"), dtype).eval().requires_grad_(False)

    def load_pipeline(self, transformer: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """The diffusers pipeline around this transformer, with `transformer` in its place where one is given.

        Raises:
            DitqError: this checkpoint is a transformer alone, or the pipeline's other parts do not load.
        """
        import diffusers

        if self.pipeline_root is None:
            raise DitqError(
                f"{self.name}: a transformer alone cannot draw; give the whole pipeline folder (with model_index.json)"
            )
        try:
            with quiet_libraries():
                # By its own class: the common one forgets a transformer that the class calls optional, as Wan's do.
                name = read_json(self.pipeline_root / "model_index.json").get("_class_name")
                kind = getattr(diffusers, name, None) if isinstance(name, str) else None
                model = self.load_model(dtype) if transformer is None else transformer
                pipeline = (kind or diffusers.DiffusionPipeline).from_pretrained(
                    str(self.pipeline_root),
                    transformer=model,
                    torch_dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                )
        except (*REFUSALS, OSError, ImportError, SafetensorError) as error:
            raise DitqError(f"{self.name}: the pipeline does not load: {_first_line(error)}") from error
        if pipeline.transformer is not model:
            raise DitqError(
                f"{self.name}: {type(pipeline).__name__} takes no transformer that it is given, only its own"
            )
        pipeline.set_progress_bar_config(disable=True)
        if type(getattr(pipeline, "vae", None)).__name__ in ONLY_IN_TILES:
            pipeline.vae.enable_tiling()
        return pipeline


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a DitqError that names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DitqError(f"{path}: cannot be read: {_first_line(error)}") from error
    return _parse_json(text, str(path))


def _parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DitqError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DitqError(f"{where}: should hold a JSON object, not {type(value).__name__}")
    return value


def _class_name(config: Mapping[str, Any], name: str) -> str:
    found = config.get("_class_name")
    if not isinstance(found, str):
        raise DitqError(f"{name}: config.json has no _class_name, so its model class is not known")
    return found


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
