"""What commands are given, as objects: models, pipelines, schedulers, devices, images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .app import INDEX


@dataclass(frozen=True)
class Opened:
    """A model of a folder, and the pipeline that it is part of.

    scheduler: the one that it was trained with, None where nobody says. pipeline: None for a model alone.
    """

    model: Any
    scheduler: Any
    pipeline: Any = None
    component: str | None = None

    def save(self, out: Path) -> None:
        """Write the whole pipeline, or the model with its scheduler beside it."""
        if self.pipeline is not None:
            self.pipeline.save_pretrained(out)
            return
        self.model.save_pretrained(out)
        if self.scheduler is not None:
            self.scheduler.save_pretrained(out)


def open_model(model_dir: Path, component: str | None, scheduler: Path | None, device: str | None) -> Opened:
    """The model in ``model_dir``, or of a pipeline's the denoiser or the component that is named, on ``device``."""
    from ..pipelines.components import find_component, is_pipeline

    model_dir = located(model_dir)
    trained_with, found = scheduler_of(model_dir, scheduler), load(model_dir).to(device_of(device))
    if not is_pipeline(found):
        if component is not None:
            raise ValueError(f"--component {component} is for pipelines: there is no {INDEX} in {model_dir}")
        return Opened(found, trained_with)
    name, model = find_component(found, component)
    return Opened(model, trained_with or found.scheduler, found, name)


@dataclass(frozen=True)
class Images:
    """A folder of images, as a model is told them. labels, captions: of its batches' second half."""

    folder: Any
    opened: Opened

    def loader(self, workers: int = 0) -> Any:
        """Batches in another order in every pass, for training."""
        return self._as_trained(self.folder.shuffled(workers))

    def first(self, n: int) -> Any:
        """One batch of the first ``n`` images; of all where there are fewer."""
        import itertools

        from ..objective.batches import count, join, part

        whole: Any = None
        for batch in itertools.islice(self._as_trained(self.folder), -(-n // self.folder.batch_size)):
            joined = batch if whole is None else join(whole, batch)
            whole = whole if joined is None else joined
        return part(whole, 0, min(n, count(whole)))

    def _as_trained(self, batches: Any) -> Any:
        if self.opened.pipeline is None:
            return batches
        from ..pipelines.encoding import encoded

        return encoded(self.opened.pipeline, batches, self.opened.component)


def open_images(
    opened: Opened, folder: Path, size: int | None, batch_size: int, seed: int, skip: bool, say: Callable[[str], None]
) -> Images:
    """The images in ``folder`` as the model is trained on them: with captions, or classes, where it is told such."""
    from ..objective.conditioning import is_autoencoder, wants_labels
    from ..objective.image_folder import ImageFolder
    from ..pipelines.components import takes_captions

    channels, wanted = image_size(opened.model if opened.pipeline is None else opened.pipeline, size)
    denoiser = not is_autoencoder(opened.model)
    captions = denoiser and opened.pipeline is not None and takes_captions(opened.pipeline)
    labels = denoiser and not captions and wants_labels(opened.model)
    found = ImageFolder(folder, wanted, channels, batch_size, seed, captions, labels, skip)
    if found.skipped:
        say(f"skipped: {len(found.skipped)} files that can't be read as images, the first is {found.skipped[0]}")
    return Images(found, opened)


def image_size(model: Any, size: int | None) -> tuple[int, tuple[int, int]]:
    """The channels of a model's or a pipeline's images, and height and width: ``size``, or what it is made for."""
    from ..pipelines.components import image_shape, is_pipeline

    if is_pipeline(model):
        channels, default = image_shape(model)
    else:
        channels, default = model.config.get("in_channels", 3), model.config.get("sample_size")
    wanted = size or default
    if wanted is None:
        raise ValueError("--size: the model's config has no sample_size, so the images' size must be given")
    height, width = (wanted, wanted) if isinstance(wanted, int) else wanted
    return channels, (height, width)


def located(place: Path) -> Path:
    """The folder ``place``, or what the hub has under such a name: ``user/repo``, ``user/repo@revision``."""
    from ..checkpoint.hub import folder_of

    if place.is_dir():
        return place
    name, _, revision = place.as_posix().partition("@")
    folder = folder_of(name, revision=revision or None, pipelines=True)
    if not folder.is_dir():
        raise ValueError(f"{place} is neither a folder nor the name of a repository on the hub (user/repo)")
    return folder


def load(model_dir: Path, weights: bool = True) -> Any:
    """The model or pipeline in a folder; without weights the model, on ``meta`` where that is possible."""
    from ..checkpoint.dense import model_in

    if not weights or not (model_dir / INDEX).exists():
        return model_in(model_dir, weights)
    from ..pipelines.loading import pipeline_from_pretrained

    return pipeline_from_pretrained(model_dir)


def device_of(name: str | None) -> Any:
    import torch

    try:  # each of several processes has a device of its own
        cuda = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
        device = torch.device(name or (cuda if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None
    return device


def image_loader(
    model: Any,
    component: str | None,
    images: Path | None,
    prompts: Path | None,
    own_samples: bool,
    criterion: str,
    size: int | None,
    batch_size: int,
    seed: int,
) -> Any:
    from ..architectures.inputs import knows_inputs
    from ..objective.conditioning import is_autoencoder, wants_labels
    from ..objective.image_folder import ImageFolder
    from ..pipelines.components import find_component, is_pipeline, takes_captions
    from ..pipelines.encoding import check_known

    if (images is not None) + (prompts is not None) + own_samples > 1:
        raise ValueError("--images, --prompts and --own-samples: give one of them")
    if prompts is not None:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--prompts {prompts}: there is no line of text in it")
        return lines
    if own_samples:
        return None
    if images is None and criterion in ("magnitude", "random"):
        if not is_pipeline(model) and not knows_inputs(model):
            raise ValueError(
                f"no example inputs are known for {type(model).__name__}: give its pipeline's folder with --component"
            )
        return None
    if is_pipeline(model):
        check_known(*find_component(model, component))
    if images is None:
        raise ValueError(
            f"--images: criterion {criterion} needs a folder of training images; without one give --prompts (a "
            "pipeline from text) or --own-samples (any other)"
        )
    channels, wanted = image_size(model, size)
    captions = is_pipeline(model) and takes_captions(model) and not is_autoencoder(find_component(model, component)[1])
    labels = not is_pipeline(model) and wants_labels(model)
    return ImageFolder(images, wanted, channels, batch_size, seed, captions, labels)


def scheduler_of(model_dir: Path, given: Path | None) -> Any:
    """The scheduler whose noise the model was trained with: the given one, its pipeline's, or None."""
    import diffusers

    from ..checkpoint.dense import read_config

    name = "scheduler_config.json"
    places = [given] if given is not None else [model_dir, model_dir / "scheduler", model_dir.parent / "scheduler"]
    for place in places:
        if (place / name).exists():
            config = read_config(place / name)
            cls = getattr(diffusers, config["_class_name"], None) if config["_class_name"].isidentifier() else None
            if not isinstance(cls, type) or not issubclass(cls, diffusers.SchedulerMixin):
                raise ValueError(f"{place / name}: {config['_class_name']!r} is not a scheduler of diffusers")
            return cls.from_config(config)  # type: ignore[attr-defined]
    if given is not None:
        raise ValueError(f"--scheduler {given}: there is no {name}")
    return None
