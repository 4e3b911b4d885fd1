"""The base of all pipelines: components, their devices and dtypes, and their folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn
from tqdm import tqdm

from sana_sprint import backends
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.text_encoder import PromptEncoder
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.pipelines.acceleration import AccelerationMethods
from sana_sprint.pipelines.loading import DeviceMap, DtypeRequest, load_components, save_components
from sana_sprint.pipelines.lora import LoraMethods
from sana_sprint.pipelines.prompting import PromptMethods
from sana_sprint.pipelines.published import PublishedMethods
from sana_sprint.pipelines.quantized import check_move, quantize_components
from sana_sprint.pipelines.running import CallAttributes
from sana_sprint.precision import check_dtype, parse_dtype
from sana_sprint.quantize import parse_request
from sana_sprint.resolutions import native_size
from sana_sprint.scheduler import SCMScheduler
from sana_sprint.vocabulary import Vocabulary
from sana_sprint.vocabulary import read as read_vocabulary
from sana_sprint.weights import resolve_folder
from sana_sprint.weights.paging import give_back

if TYPE_CHECKING:
    from transformers import Gemma2Model, PreTrainedTokenizerBase

DEFAULT_COMPRESSION = 32  # pixels per latent cell when there is no autoencoder to ask, as published


class BasePipeline(PromptMethods, CallAttributes, PublishedMethods, LoraMethods, AccelerationMethods):
    """Holds components and changes nothing about them in a call, so threads may share a pipeline and its components.

    Beside its components a pipeline keeps the numbers of its calls, each apart (`CallAttributes`).

    A component may be None; a call or method that needs it then raises a ValueError naming it.
    """

    component_names: ClassVar[tuple[str, ...]] = (
        "tokenizer",
        "text_encoder",
        "vae",
        "transformer",
        "scheduler",
    )
    published_class_name: ClassVar[str]

    # Each may be None: `need` raises before a call would use it.
    tokenizer: PreTrainedTokenizerBase
    text_encoder: Gemma2Model
    vae: AutoencoderDC
    transformer: SanaTransformer2DModel
    scheduler: SCMScheduler

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: Gemma2Model | None,
        vae: AutoencoderDC | None,
        transformer: SanaTransformer2DModel | None,
        scheduler: SCMScheduler | None,
    ) -> None:
        given = (tokenizer, text_encoder, vae, transformer, scheduler)
        for name, component in zip(BasePipeline.component_names, given, strict=True):
            setattr(self, name, component)
        self._progress_settings: dict[str, Any] = {}
        self._encoder: PromptEncoder | None = None
        self._calls = {}
        self._last_call = None
        self._gives_back = False
        # The words that a small model was taught, from its folder; None if that does not say.
        self.vocabulary: Vocabulary | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):  # a component: the default speed
            backends.apply(value)
        if name == "scheduler" and value is not None:
            value = SCMScheduler.taken_from(value)
        super().__setattr__(name, value)

    # ----- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: DtypeRequest | None = None,
        dtype: DtypeRequest | None = None,
        device_map: DeviceMap | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        quantization_config: Any = None,
        **components: Any,
    ) -> Self:
        """A pipeline from a name.

        Args:
            name_or_path: "emoji" (comes with this package), a folder, or a Hugging Face id.
            torch_dtype: a dtype or its name for all components, or a mapping of component name (and "default") to
                dtype. None keeps the stored ones. The text encoder and the autoencoder do not run in float16.
            dtype: another name for `torch_dtype`.
            device_map: a device, a mapping of component name to device, "auto" or "balanced" (text encoder on the
                last accelerator, the rest on the first). None is the CPU.
            variant: weight files of this variant where a component has them, such as "fp16".
            revision, cache_dir, token, local_files_only: for the Hub, see `weights.resolve_folder`.
            quantization_config: as for `quantize`; ready-made components are left as they are.
            components: ready-made ones in place of those in the folder, or None to do without, as in
                `text_encoder=None`.

        Raises:
            ValueError: naming the file, component or argument that is missing, does not fit or is not allowed.
        """
        if unknown := sorted(set(components) - set(cls.component_names)):
            raise ValueError(
                f"unknown arguments: {', '.join(unknown)}; components are {', '.join(cls.component_names)}"
            )
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise ValueError(f"torch_dtype and dtype are one setting, got: {torch_dtype!r} and {dtype!r}")
        folder = resolve_folder(
            name_or_path,
            revision=revision,
            variant=variant,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        presets = parse_request(quantization_config, cls.component_names)
        scheduler = components.get("scheduler")
        if scheduler is not None and not isinstance(scheduler, str | os.PathLike):
            SCMScheduler.taken_from(scheduler)  # refused before gigabytes are read, not after
        pipeline = cls(
            **load_components(
                folder,
                cls.component_names,
                given=components,
                dtype=dtype if torch_dtype is None else torch_dtype,
                device_map=device_map,
                variant=variant,
            )
        )
        pipeline.vocabulary = read_vocabulary(folder)
        made = {name for name, part in components.items() if part is None or isinstance(part, nn.Module)}
        return pipeline.quantize({name: presets[name] for name in presets.keys() - made})

    @classmethod
    def from_pipe(cls, pipeline: BasePipeline, **components: Any) -> Self:
        """A pipeline of this class that shares the components of another; nothing is copied.

        Args:
            pipeline: any pipeline.
            components: those that `pipeline` lacks, or replacements.

        Raises:
            ValueError: for a component that neither has, or that this class does not use.
        """
        if unknown := sorted(set(components) - set(cls.component_names)):
            raise ValueError(f"{cls.__name__} has no components {', '.join(unknown)}")
        have = {**pipeline.components, **components}
        if missing := [name for name in cls.component_names if name not in have]:
            raise ValueError(f"{cls.__name__} also needs {', '.join(missing)}")
        made = cls(**{name: have[name] for name in cls.component_names})
        made.vocabulary = pipeline.vocabulary
        return made

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        variant: str | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write a folder that `from_pretrained` and diffusers read.

        Args:
            folder: made if absent.
            variant: a word in the names of the weight files, such as "bf16".
            max_shard_size: larger weight files are split: bytes, or a size such as "500MB".

        Raises:
            ValueError: if a component cannot be written.
        """
        save_components(
            self.components,
            folder,
            class_name=self.published_class_name,
            variant=variant,
            max_shard_size=max_shard_size,
        )
        if self.vocabulary is not None:
            self.vocabulary.write(Path(folder))

    # ----- components -------------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """Name -> component, ready for another pipeline's constructor."""
        return {name: getattr(self, name) for name in self.component_names}

    def need(self, *names: str) -> None:
        """Raise ValueError if one of these components is None."""
        if missing := [name for name in names if getattr(self, name) is None]:
            raise ValueError(f"this pipeline was made without {', '.join(missing)}, which this call needs")

    def _modules(self) -> dict[str, nn.Module]:
        parts = self.components.items()
        return {name: module for name, module in parts if isinstance(module, nn.Module)}

    def _main_module(self) -> Any:
        """The transformer or, without one, whatever else there is."""
        modules = self._modules()
        if not modules:
            raise ValueError("this pipeline has no component with weights")
        return modules.get("transformer", next(iter(modules.values())))

    @property
    def device(self) -> torch.device:
        """The transformer's device."""
        device: torch.device = self._main_module().device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's."""
        dtype: torch.dtype = self._main_module().dtype
        return dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell, along each side."""
        vae = self.components["vae"]
        return DEFAULT_COMPRESSION if vae is None else int(vae.spatial_compression_ratio)

    @property
    def native_size(self) -> int:
        """Side in pixels of the pictures that the transformer was trained on, its default size."""
        return native_size(self.transformer.config.sample_size, self.vae_scale_factor)

    def to(
        self,
        *args: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Move or cast all components in place: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", torch.bfloat16)`.

        Raises:
            ValueError: before anything is changed, for a dtype that a component cannot run in.
        """
        for argument in args:
            if isinstance(argument, torch.dtype):
                dtype = argument
            else:
                device = argument
        kind = parse_dtype(dtype)
        modules = self._modules()
        for name in modules:
            check_dtype(name, kind)
        check_move(modules, device)
        for module in modules.values():
            module.to(device=device, dtype=kind)
        return self

    def quantize(self, request: Any) -> Self:
        """Quantise components in place; loaded LoRAs are merged for good first.

        Args:
            request: a preset ("int8", "int8-weights", "fp8", "int4-weights", "nf4") for the transformer and the text
                encoder; a mapping such as {"transformer": "int8", "vae": "int8"}; or objects as published:
                BitsAndBytesConfig, TorchAoConfig, PipelineQuantizationConfig. See `sana_sprint.quantize`.

        Raises:
            ValueError: before anything is changed, for a bad request, or a preset that the component's device cannot run.
        """
        quantize_components(self.components, request)
        return self

    # ----- memory -----------------------------------------------------------------------------------------------------

    def enable_disk_offload(self, enabled: bool = True) -> None:
        """Give each component's memory back as soon as a call has no more use for it, as far as it is in mapped files.

        For CPUs, on Linux: the process then holds the text encoder or the transformer or the autoencoder, and not all of
        them. The system keeps the files in its cache while it has room, so the next call is as good as as fast; without
        room it reads them from the disk. Weights that were cast, quantised, adapted or moved in memory stay there.
        """
        self._gives_back = enabled

    def _give_back(self, *names: str) -> None:
        """These components' part of a call is done."""
        if self._gives_back:
            for module in (getattr(self, name, None) for name in names):
                if isinstance(module, nn.Module):
                    give_back(module)

    def enable_vae_slicing(self) -> None:
        """Decode one picture at a time: less memory, same pictures."""
        self.need("vae")
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all pictures of a call together."""
        self.need("vae")
        self.vae.disable_slicing()

    def enable_vae_tiling(self, **settings: Any) -> None:
        """Decode in overlapping tiles: big pictures in little memory, slightly other values. See the autoencoder's
        `enable_tiling` for `settings`."""
        self.need("vae")
        self.vae.enable_tiling(**settings)

    def disable_vae_tiling(self) -> None:
        """Decode in one piece."""
        self.need("vae")
        self.vae.disable_tiling()

    # ----- progress ---------------------------------------------------------------------------------------------------

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Settings of tqdm's progress bar, such as `disable=True`. It shows on stderr if that is a terminal."""
        self._progress_settings = settings

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> tqdm[Any]:
        """A bar over `iterable`, or one for `total` steps."""
        if iterable is None and total is None:
            raise ValueError("give iterable or total; got: neither")
        return tqdm(iterable, total=total, **{"disable": None, **self._progress_settings})
