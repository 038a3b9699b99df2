"""From images and captions to what a pipeline's denoiser is trained with.

The pipeline itself says what its denoiser takes: it is called with the captions, and stopped at the denoiser's first
call. Whatever belongs to that call beside the noisy latents and the timestep (embeddings, masks, sizes, positions,
guidance) is the conditioning; the latents come from the images.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.denoisers import TIMESTEP_NAMES
from ..objective.batches import as_loader
from ..objective.calls import first_call, recorded_call
from ..objective.checks import check_images
from ..objective.conditioning import LABEL_KEYS, is_autoencoder, signature_of, wants_labels
from ..objective.forms import as_batch
from ..objective.isolation import in_mode
from ..objective.loss import make_objective
from ..objective.nested import moved
from .components import autoencoder_of, find_component, image_shape, modules_of
from .latents import as_they_are, as_video, decodes, normalised, packed, raw_latents, upcast

IMAGE_KEYS = ("images", "image", "pixel_values", "input", "img")


CAPTION_KEYS = ("prompt", "prompts", "caption", "captions", "text", "texts")


# What a call is made with, where the pipeline knows it. Guidance would double the batch; where "true_cfg_scale" turns
# it on, "guidance_scale" is an input of the denoiser and stays the pipeline's own.
SETTINGS: Mapping[str, Any] = {"num_inference_steps": 2, "use_resolution_binning": False, "true_cfg_scale": 1.0}


# Between the pipeline's first time and the loss's: half precision rounds by .004; units and directions differ by more.
TIME_TOLERANCE = 0.01


# Of an example image, in pixels, where neither pipeline nor denoiser says what size it makes.
DEFAULT_SIZE = 256


def encoded(pipe: Any, loader: Any, component: str | None = None) -> Iterable[Any]:
    """The loader's batches as ``pipe``'s component is trained with them, for :func:`score` and ``finetune``.

    Batches are encoded as they are drawn, without gradients, and not kept.

    Args:
        pipe: a diffusers pipeline.
        loader: batches of images ``(batch, 3, height, width)`` in [-1, 1], ``(images, captions)`` or ``(images,
            labels)`` pairs, or dicts with ``images``, ``captions``, ``class_labels`` and further arguments of the
            pipeline's call, such as ``prompt_embeds``.
        component: the denoiser (None) or its name; an autoencoder gets the images alone.

    Returns:
        An iterable of dicts by the names that the component's forward has; it can be walked as often as ``loader``.

    Raises:
        ValueError: the component is neither denoiser nor autoencoder, or the pipeline can't be asked what its denoiser
            takes.

    Example:
        >>> from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4)
        >>> pipe = DDPMPipeline(unet, DDPMScheduler())
        >>> batches = encoded(pipe, [torch.rand(4, 3, 8, 8) * 2 - 1])
        >>> {name: tuple(value.shape) for name, value in next(iter(batches)).items()}
        {'sample': (4, 3, 8, 8)}
    """
    name, model = find_component(pipe, component)
    check_known(name, model)
    encode: Callable[[Any], Any] = images_alone if is_autoencoder(model) else Encoder(pipe, name, model)
    loader = as_loader(loader)
    return map(encode, loader) if isinstance(loader, Iterator) else Encoded(loader, encode)


def check_known(name: str, model: nn.Module) -> None:
    """Raises ValueError for a component that is neither a denoiser nor an autoencoder."""
    if is_autoencoder(model) or not set(TIMESTEP_NAMES).isdisjoint(inspect.signature(model.forward).parameters):
        return
    raise ValueError(
        f"{name} ({type(model).__name__}) is neither a denoiser nor an autoencoder: its loss is not known, pass "
        "loss_fn(model, batch, t, noise)"
    )


def example_call(pipe: Any, component: str | None = None) -> Any:
    """What :func:`trace` needs, as ``pipe`` calls its component: one black image, an empty caption, class 0.

    Raises ValueError for a component that is neither a denoiser nor an autoencoder, and for a pipeline that can't be
    called so.
    """
    name, model = find_component(pipe, component)
    check_known(name, model)
    channels, size = image_shape(pipe)
    image = torch.zeros(1, channels, size or DEFAULT_SIZE, size or DEFAULT_SIZE)
    if is_autoencoder(model):
        return first_call(model, [as_video(model, image)])[0]
    encoder = Encoder(pipe, name, model)
    given = {"prompt": [""], "class_labels": [0]}
    called = moved(encoder.recorded(image, {k: v for k, v in given.items() if k in encoder.known}), torch.device("cpu"))
    return {k: v for k, v in called.items() if v is not None}


class Encoded:
    """A loader whose batches are encoded as they are drawn; it can be walked as often as the loader itself."""

    def __init__(self, loader: Iterable[Any], encode: Callable[[Any], Any]) -> None:
        self._loader, self._encode = loader, encode
        # Their states are given back after scoring, as the loader's own.
        self.generator, self.sampler = getattr(loader, "generator", None), getattr(loader, "sampler", None)

    def __iter__(self) -> Iterator[Any]:
        return map(self._encode, self._loader)


class Encoder:
    """Encodes batches for one denoiser of a pipeline, which is left as it is."""

    def __init__(self, pipe: Any, name: str, model: nn.Module) -> None:
        if "controlnet" in pipe.components:
            raise ValueError(
                f"{type(pipe).__name__} is steered by a network that looks at the noisy images: prune the {name} in "
                "the text-to-image pipeline of the same parts, or alone with loss_fn"
            )
        if getattr(pipe, "scheduler", None) is None:
            raise ValueError(f"{type(pipe).__name__} has no scheduler of its own: give one of the pipelines inside it")
        self.model, self.name = model, name
        self.vae = upcast(autoencoder_of(pipe))
        self.pipe = _callable_copy(pipe, name, model)
        self.known = set(inspect.signature(pipe.__call__).parameters)
        self.normalise: Callable[[nn.Module, Tensor], Tensor] | None = None
        self.checked = False

    def __call__(self, batch: Any) -> dict[str, Any]:
        """The denoiser's inputs, by name, without the timestep; the latents are not noisy.

        Raises ValueError for missing captions, images that the VAE can't take or of a size that the pipeline doesn't
        make, and for a pipeline that scales its latents in an unknown way.
        """
        images, given = read(as_batch(batch))
        check_images(self.model if self.vae is None else self.vae, images)
        for what in ("prompt", "class_labels"):
            if len(given.get(what, images)) != len(images):
                raise ValueError(f"the batch has {len(images)} images, but {len(given[what])} entries of {what!r}")
        signature = signature_of(self.model)
        inputs = self.recorded(images, given)
        noisy = inputs[signature.sample]
        with self._encoding():
            latents = images if self.vae is None else self._latents(images, given, noisy)
        self._check_shape(images, latents, noisy)
        if not self.checked:
            self._check_time(inputs.get(signature.timestep or ""))
            self.checked = True
        labels = given.get("class_labels")
        if labels is not None and wants_labels(self.model):
            inputs["class_labels"] = torch.as_tensor(labels)  # the pipeline itself may know no classes
        dropped = (signature.sample, signature.timestep, "return_dict")
        return {
            signature.sample: latents,
            **{k: v for k, v in inputs.items() if k not in dropped and v is not None},
        }

    def recorded(self, images: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the pipeline calls its denoiser with first, by name, when it is to make as many images of that size."""
        with self._encoding():
            return recorded_call(self.model, lambda: self._call(self.pipe, images, given))

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        with torch.no_grad(), in_mode(nn.ModuleList(modules_of(self.pipe).values()), training=False):
            yield

    def _latents(self, images: Tensor, given: Mapping[str, Any], noisy: Tensor) -> Tensor:
        """The images' latents as the denoiser knows them. With the first batch it is found out how that is."""
        assert self.vae is not None
        raw = raw_latents(self.vae, images)
        if self.normalise is not None:
            return packed(self.pipe, self.normalise(self.vae, raw), noisy)
        for normalise in (normalised, as_they_are):
            latents = packed(self.pipe, normalise(self.vae, raw), noisy)
            self._check_shape(images, latents, noisy)
            if decodes(self.pipe, self.name, latents, raw, lambda pipe: self._call(pipe, images, given)):
                self.normalise = normalise
                return latents
        raise ValueError(
            f"{type(self.pipe).__name__} scales the latents of its {type(self.vae).__name__} in a way that is not "
            f"known: encode the images yourself and prune the {self.name} alone"
        )

    def _check_shape(self, images: Tensor, latents: Tensor, noisy: Tensor) -> None:
        if latents.shape != noisy.shape:
            raise ValueError(
                f"{type(self.pipe).__name__} gives its {type(self.model).__name__} {tuple(noisy.shape)}, the loader's "
                f"images {tuple(images.shape)} become {tuple(latents.shape)}: give images of the size that the "
                "pipeline makes, or encode them yourself and prune the component alone"
            )

    def _check_time(self, told: Any) -> None:
        """The loss has to tell the denoiser the time as the pipeline does: the timestep, or one from 0 to 1."""
        try:
            objective = make_objective(self.model, self.pipe.scheduler)
        except ValueError:
            return  # scoring will say so, unless it has a loss_fn
        expected = float(self.pipe.scheduler.timesteps[0])
        if objective.time is not None:
            expected *= float(objective.time[-1]) / objective.n_timesteps
        found = float(torch.as_tensor(told).flatten()[0])
        if abs(found - expected) > TIME_TOLERANCE * abs(expected):
            raise ValueError(
                f"{type(self.pipe).__name__} tells its {type(self.model).__name__} the time {found:g} where the loss "
                f"would tell it {expected:g}: prune the {self.name} with loss_fn(model, batch, t, noise)"
            )

    def _call(self, pipe: Any, images: Tensor, given: Mapping[str, Any]) -> None:
        """Call a copy of the pipeline for as many images, of that size."""
        from diffusers.utils import is_bs4_available, is_ftfy_available

        arguments: dict[str, Any] = {
            "batch_size": len(images),
            "height": images.shape[-2],
            "width": images.shape[-1],
            "num_frames": images.shape[2] if images.ndim == 5 else 1,
            "generator": torch.Generator().manual_seed(0),
            **SETTINGS,
            "clean_caption": is_bs4_available() and is_ftfy_available(),  # else every call says that it can't
            **({} if "true_cfg_scale" in self.known else {"guidance_scale": 1.0}),
            **given,
        }
        if "prompt" in self.known and "prompt" not in given and not any(k.startswith("prompt_embeds") for k in given):
            raise ValueError(
                f"{type(self.pipe).__name__} needs captions, but the loader's batches don't have them: yield "
                "(images, captions), captions a list of strings ('' for none)"
            )
        if "class_labels" in self.known and "class_labels" not in given:
            raise ValueError(f"{type(self.pipe).__name__} needs class labels: let the loader yield (images, labels)")
        try:
            pipe(**{k: v for k, v in arguments.items() if k in self.known})
        except (TypeError, ValueError, AttributeError) as e:
            hint = "; prune what AutoPipelineForText2Image.from_pipe makes of it" if "image" in self.known else ""
            raise ValueError(
                f"{type(self.pipe).__name__} can't be called with images of {images.shape[-2]}x{images.shape[-1]} and "
                f"{sorted(given) or 'nothing else'}: {e}{hint}"
            ) from e


def read(batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """The images of a batch, and arguments for the pipeline's call: ``prompt``, ``class_labels`` and others by name.

    Raises TypeError for a batch that is neither images nor a pair nor a dict.
    """
    if isinstance(batch, Tensor):
        return batch, {}
    if isinstance(batch, Mapping):
        given = dict(batch)
        images = next((given.pop(k) for k in IMAGE_KEYS if isinstance(given.get(k), Tensor)), None)
        for name, keys in (("prompt", CAPTION_KEYS), ("class_labels", LABEL_KEYS)):
            key = next((k for k in keys if k in given), None)
            if key is not None:
                given[name] = _rows(given.pop(key))
        if images is not None:
            return images, given
    elif isinstance(batch, Sequence) and batch and isinstance(batch[0], Tensor) and len(batch) <= 2:
        if len(batch) == 1:
            return batch[0], {}
        beside = _rows(batch[1])
        if isinstance(beside, list) and all(isinstance(x, str) for x in beside):
            return batch[0], {"prompt": beside}
        if isinstance(beside, list) and all(isinstance(x, int) for x in beside):
            return batch[0], {"class_labels": beside}
    raise TypeError(
        f"the loader yields {type(batch).__name__}, which is no batch for a pipeline: give images, (images, captions), "
        "(images, labels) or a dict with 'images', 'captions', 'class_labels'"
    )


def images_alone(batch: Any) -> Tensor:
    """What an autoencoder is trained with."""
    return read(batch)[0]


def _rows(value: Any) -> Any:
    """Captions or labels as a list with one entry per image."""
    if isinstance(value, Tensor):
        return value.reshape(-1).tolist()
    return [value] if isinstance(value, str) else list(value)


def _callable_copy(pipe: Any, name: str, model: nn.Module) -> Any:
    """A shallow copy that may be called: with its own scheduler, silent, on the device of its text encoders."""
    modules = modules_of(pipe)
    encoders = [m for n, m in modules.items() if n.startswith("text_encoder")]
    device = next((encoders or [model])[0].parameters()).device
    twin = copy.copy(pipe)
    setattr(twin, name, model)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    twin.set_progress_bar_config(disable=True)
    on_device = {"device": property(lambda _: device), "_execution_device": property(lambda _: device)}
    twin.__class__ = type(type(pipe).__name__, (type(pipe),), on_device)
    return twin
