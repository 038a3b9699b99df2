"""Batches for a pipeline without images: it makes them itself, of prompts, of classes, or of noise alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..evaluation.own_samples import OWN_SAMPLES, MadeBatches, n_classes
from ..objective.isolation import in_mode
from ..objective.randomness import generator_for, own_randomness
from .components import find_component, modules_of, takes_captions

# What the call is told of the text, and the encoding of the captions has to be told as well.
OF_THE_TEXT = ("max_sequence_length",)


def own_batches(
    pipe: Any,
    prompts: str | Iterable[str] | None = None,
    *,
    n: int = 512,
    steps: int = 25,
    seed: int = 0,
    batch: int = 16,
    progress: bool = True,
    **call: Any,
) -> OwnPipelineSamples:
    """A loader for :func:`score_and_prune` of images that ``pipe`` makes by its own call.

    prompts: for a pipeline that takes text, used in turn until there are ``n`` images; None for one that is told a
    class (drawn uniformly) or nothing. steps: denoising steps of each. call: further arguments of the pipeline's call,
    such as ``height``, ``width`` or ``guidance_scale``; its own defaults otherwise.
    Batches are images in [-1, 1], ``(images, captions)`` or ``(images, labels)``, or a dict of images, captions and
    what else the text encoders are told. They are made when they are first asked for and kept in 8 bits.

    Raises ValueError for lacking or superfluous prompts, TypeError for prompts that are no strings.
    """
    return OwnPipelineSamples(pipe, prompts, n=n, steps=steps, seed=seed, batch=batch, progress=progress, call=call)


class OwnPipelineSamples(MadeBatches):
    """What :func:`own_batches` gives."""

    def __init__(
        self, pipe: Any, prompts: str | Iterable[str] | None, *, call: dict[str, Any], **settings: Any
    ) -> None:
        name, denoiser = find_component(pipe)
        super().__init__(denoiser, **settings)
        self._known = inspect.signature(pipe.__call__).parameters
        unknown = call.keys() - self._known.keys()
        if unknown:
            raise TypeError(f"{type(pipe).__name__} takes no {sorted(unknown)}: its call has {sorted(self._known)}")
        self._pipe, self._call = _callable_copy(pipe, name, denoiser), call
        self._prompts = _checked(prompts, pipe)
        self._classes = n_classes(denoiser) if "class_labels" in self._known else None

    def _make(self, index: int, size: int, steps: int) -> Any:
        generator = generator_for(self.seed, OWN_SAMPLES, index)
        first = index * self.batch
        given: dict[str, Any] = {}
        beside: Any = None
        if self._prompts is not None:
            beside = given["prompt"] = [self._prompts[(first + i) % len(self._prompts)] for i in range(size)]
        elif self._classes is not None:
            beside = torch.randint(self._classes, (size,), generator=generator)
            given["class_labels"] = beside.tolist()
        else:
            given["batch_size"] = size
        images = _eight_bits(self._run(given, generator, steps))
        if len(images) != size:
            raise ValueError(f"{type(self._pipe).__name__} made {len(images)} images where {size} were asked for")
        return images, beside

    def _run(self, given: dict[str, Any], generator: torch.Generator, steps: int) -> Any:
        from diffusers.utils import is_bs4_available, is_ftfy_available

        arguments = {
            "num_inference_steps": steps,
            "generator": generator,
            "output_type": "pt",
            "clean_caption": is_bs4_available() and is_ftfy_available(),  # else every call says that it can't
            **self._call,
            **given,
        }
        models = nn.ModuleList(modules_of(self._pipe).values())
        # Some schedulers draw from the global generator.
        with torch.no_grad(), in_mode(models, training=False), own_randomness(self.seed):
            return self._pipe(**{k: v for k, v in arguments.items() if k in self._known}).images

    def _given(self, kept: Any) -> Any:
        images, beside = kept[0].float() / 127.5 - 1, kept[1]
        text = {k: v for k, v in self._call.items() if k in OF_THE_TEXT}
        if text and self._prompts is not None:
            return {"images": images, "captions": beside, **text}
        return images if beside is None else (images, beside)


def _checked(prompts: str | Iterable[str] | None, pipe: Any) -> Sequence[str] | None:
    texts = [prompts] if isinstance(prompts, str) else None if prompts is None else list(prompts)
    if texts is None:
        if takes_captions(pipe):
            raise ValueError(
                f"{type(pipe).__name__} makes images of text: give prompts, a list of strings, or a loader"
            )
        return None
    if not takes_captions(pipe):
        raise ValueError(f"{type(pipe).__name__} takes no text: leave out the prompts, or give a loader of images")
    if not texts:
        raise ValueError("there are no prompts: give at least one string")
    wrong = next((x for x in texts if not isinstance(x, str)), None)
    if wrong is not None:
        raise TypeError(f"prompts must be strings, there is a {type(wrong).__name__} among them")
    return texts


def _callable_copy(pipe: Any, name: str, denoiser: nn.Module) -> Any:
    """A shallow copy that may be called: silent, with a scheduler of its own, and without the check that blackens."""
    twin = copy.copy(pipe)
    setattr(twin, name, denoiser)
    # Ancestral sampling needs hundreds of steps where DDIM needs dozens.
    from diffusers import DDIMScheduler, DDPMScheduler  # a pipeline has imported them

    ancestral = isinstance(pipe.scheduler, DDPMScheduler)
    twin.scheduler = DDIMScheduler.from_config(pipe.scheduler.config) if ancestral else copy.deepcopy(pipe.scheduler)
    if getattr(twin, "safety_checker", None) is not None:
        twin.safety_checker = None  # nobody sees these images, and black ones would teach black
    twin.set_progress_bar_config(disable=True)
    return twin


def _eight_bits(images: Any) -> Tensor:
    """``(n, channels, height, width)`` images in [0, 1], or numpy's with the channels last, as uint8 on the host.

    Raises FloatingPointError where they aren't finite.
    """
    x = torch.from_numpy(images).movedim(-1, 1) if isinstance(images, np.ndarray) else images
    if not bool(x.isfinite().all()):
        raise FloatingPointError("the pipeline made NaN or infinite images: its weights are not usable")
    return (x.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous()
