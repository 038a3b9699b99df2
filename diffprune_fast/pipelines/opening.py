"""What a user gives to be pruned, a model or a pipeline: the module, its batches, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from ..checkpoint import saved_as_pruned
from ..result import PruneResult
from ..scoring.untouched import unwrapped
from .components import find_component, is_pipeline, put_back
from .encoding import encoded


def opened(
    model: Any, component: str | None, loader: Iterable[Any] | None, options: dict[str, Any]
) -> tuple[nn.Module, Iterable[Any] | None, dict[str, Any], Callable[[PruneResult], PruneResult]]:
    """The module to prune, what it is scored with, and what puts it back into its pipeline.

    A component is trained with its pipeline's scheduler, on what VAE and text encoders make of the loader's batches
    (a ``loss_fn`` gets them as they are). A model that is no pipeline is all there is; inside ``torch.compile`` or
    DistributedDataParallel it is the module in there.

    Raises ValueError for a component that isn't there, TypeError for what is neither a module nor a pipeline.
    """
    if not is_pipeline(model):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the model is a {type(model).__name__}: give a torch.nn.Module or a diffusers pipeline, loaded with "
                "its from_pretrained()"
            )
        if component is not None:
            raise ValueError(f"component={component!r} is for pipelines; {type(model).__name__} is none")
        return unwrapped(model), loader, options, saved_as_pruned
    name, module = find_component(model, component)
    if loader is not None and options.get("loss_fn") is None:
        loader = encoded(model, loader, name)
    options = {"scheduler": getattr(model, "scheduler", None), **options}
    return module, loader, options, partial(put_back, model, name)
