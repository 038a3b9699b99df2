"""What a user gives to be pruned, a model or a pipeline: the module, and what it is trained with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..architectures.attached import check_attached
from ..evaluation.own_samples import OwnSamples
from ..objective.isolation import unwrapped
from .components import find_component, is_pipeline, place_of
from .encoding import encoded
from .own_samples import own_batches


@dataclass(frozen=True)
class Target:
    """The module to prune, inside a pipeline or alone.

    loader: batches that fit the module. scheduler: that of its training, None where nothing says. pipeline, component:
    where the module is a part of one.
    """

    model: nn.Module
    loader: Iterable[Any] | None
    scheduler: Any = None
    pipeline: Any = None
    component: str | None = None

    def place_of(self, model: nn.Module) -> dict[str, Any]:
        """The fields of a result that name the pipeline which holds the pruned module; none where there is none."""
        return {} if self.component is None else place_of(self.pipeline, self.component, model)


def are_prompts(loader: Any) -> bool:
    """Whether what stands in a loader's place is text to make images of."""
    return isinstance(loader, str) or (
        isinstance(loader, (list, tuple)) and len(loader) > 0 and all(isinstance(x, str) for x in loader)
    )


def own_loader(model: Any, prompts: Any = None, *, scheduler: Any = None, seed: int = 0, progress: bool = True) -> Any:
    """Batches that the model, or the pipeline from prompts, makes itself: 512 samples of 25 denoising steps.

    Raises ValueError for a model that can't be sampled from noise alone, or lacking or superfluous prompts.
    """
    if is_pipeline(model):
        return own_batches(model, prompts, seed=seed, progress=progress)
    if prompts is not None:
        raise ValueError(f"prompts are for pipelines; {type(model).__name__} is none: give a loader of images")
    return OwnSamples(unwrapped(model), scheduler, seed=seed, progress=progress)


def find_target(
    model: Any, component: str | None, loader: Iterable[Any] | None, options: Mapping[str, Any] | None = None
) -> Target:
    """The module to prune and what it is scored with.

    A component is trained with its pipeline's scheduler, on what VAE and text encoders make of the loader's batches
    (a ``loss_fn`` gets them as they are). A model that is no pipeline is all there is; inside ``torch.compile`` or
    DistributedDataParallel it is the module in there. options: ``scheduler`` and ``loss_fn``, as for scoring.

    Raises ValueError for a component that isn't there, TypeError for what is neither a module nor a pipeline.
    """
    given = options or {}
    scheduler = given.get("scheduler")
    if not is_pipeline(model):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the model is a {type(model).__name__}: give a torch.nn.Module or a diffusers pipeline, loaded with "
                "its from_pretrained()"
            )
        if component is not None:
            raise ValueError(f"component={component!r} is for pipelines; {type(model).__name__} is none")
        check_attached(unwrapped(model))
        return Target(unwrapped(model), loader, scheduler)
    name, module = find_component(model, component)
    check_attached(module)
    if loader is not None and given.get("loss_fn") is None:
        loader = encoded(model, loader, name)
    return Target(module, loader, given.get("scheduler", getattr(model, "scheduler", None)), model, name)
