"""``FusedImportance``: Torch-Pruning's Taylor and magnitude importances from one pass over all weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...choices import check_choice
from ...scoring.criteria import CRITERIA
from .library import tp
from .sums import ChannelSums, MissingGradient

Norms = Literal["torch-pruning", "all"]

TARGETS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_OUT = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
_IN = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
_OF_NORMS = (
    tp.prune_batchnorm_out_channels,
    tp.prune_layernorm_out_channels,
    tp.prune_groupnorm_out_channels,
    tp.prune_instancenorm_out_channels,
)
# A parameter, the dim that is looked at, and which of its channels.
Place = tuple[Tensor, int, "Tensor | Sequence[int] | None"]


class FusedImportance(tp.importance.GroupMagnitudeImportance):
    """An importance for Torch-Pruning's pruners that reads every weight and gradient of the model once.

    The first group that a pruner asks for makes one pass over the whole model; the others are looked up. What changed
    since is read anew: parameters that were replaced, sliced or written to, and everything once a group is asked for
    again. A change through ``.data`` between the first question for one group and the first for another goes unseen;
    :meth:`reset` before it helps.

    Args:
        criterion: ``"diff-pruning"`` (the sum of ``|theta * g|``) equals ``GroupTaylorImportance``, ``"taylor"``
            (``|sum of theta * g|``) the same with ``multivariable=True``, ``"magnitude"`` equals
            ``GroupMagnitudeImportance``; ``"fisher"`` sums ``(theta * g)**2``.
        p: of ``"magnitude"``: the sum of ``|theta|**p``.
        group_reduction, normalizer, bias, target_types: as Torch-Pruning's importances have them.
        norms: ``"torch-pruning"`` counts the norm layers that its importances count, which is LayerNorm, for Taylor
            also GroupNorm and for magnitude BatchNorm where target_types names them; ``"all"`` counts every norm's
            weight.
        backend: who computes the sums, see :func:`~diffprune_fast.ops.channel_scores_`.

    Raises:
        ValueError: a criterion that needs more than weights and gradients; a parameter without a gradient.

    Example:
        >>> import torch, torch_pruning as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> x = torch.randn(8, 4)
        >>> model(x).square().mean().backward()
        >>> pruner = tp.pruner.BasePruner(model, x, FusedImportance(), pruning_ratio=0.5, ignored_layers=[model[2]])
        >>> pruner.step()
        >>> model[0].out_features
        8

    Source: Fang et al., DepGraph (arXiv 2301.12900) for the groups; Structural Pruning for Diffusion Models (arXiv
    2305.10924), eq. 7, for ``"diff-pruning"``.
    """

    def __init__(
        self,
        criterion: str = "diff-pruning",
        *,
        p: float = 2,
        group_reduction: str | None = "mean",
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        bias: bool = False,
        target_types: Sequence[type] = TARGETS,
        norms: Norms = "torch-pruning",
        backend: str = "auto",
    ) -> None:
        elements = {name: rule.element for name, rule in CRITERIA.items() if rule.element is not None}
        if criterion not in elements:
            raise ValueError(f"criterion={criterion!r}: choose one of {', '.join(map(repr, elements))}")
        check_choice("norms", norms, Norms)
        super().__init__(p=p, group_reduction=group_reduction, normalizer=normalizer, bias=bias)
        self.target_types = list(target_types)
        self.criterion, self.norms = criterion, norms
        self.look_up = LookUp(elements[criterion] or "", p, backend)
        self._accumulated = False

    def reset(self) -> None:
        """Forget all sums: the next question makes a pass over the model as it is then."""
        self.look_up.clear()
        self._accumulated = False

    def accumulate(self, model: nn.Module) -> None:
        """Add the sums of the gradients that are there now; call it after each micro-batch's ``backward()``.

        The absolute value is then taken per micro-batch, where gradients that are summed first cancel. Importances are
        of these sums until :meth:`reset`.

        Args:
            model: the model that is being pruned.

        Raises:
            ValueError: no parameter has a gradient.
        """
        if not self._accumulated:
            self.look_up.clear()
        weights = list(model.parameters())
        if self.criterion != "magnitude" and all(w.grad is None for w in weights):
            raise ValueError(f"no parameter of {type(model).__name__} has a gradient: call backward() first")
        with torch.no_grad():
            self.look_up.sums.add(weights, to_last=True)
        self._accumulated = True

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Importances of a group's channels, in the order of its root's indices; None where nothing counts."""
        parts = list(places(self, group, taylor=self.criterion != "magnitude", every_norm=self.norms == "all"))
        if self._accumulated:
            self._check_unchanged(parts)
        else:
            self.look_up.refresh(group, [weight for (weight, _, _), _ in parts])
        return reduced(self, self.look_up.values(parts), [roots for _, roots in parts])

    def _check_unchanged(self, parts: Sequence[tuple[Place, Sequence[Any]]]) -> None:
        for (weight, _, _), _ in parts:
            if not self.look_up.sums.holds(weight, same_values=False):
                raise ValueError(
                    f"there are no sums of a parameter of shape {tuple(weight.shape)}: it had no gradient when "
                    "accumulate() was called, or was pruned since; call reset() and accumulate() again"
                )


class LookUp:
    """Sums over channels for one group after the other."""

    def __init__(self, element: str, p: float, backend: str = "auto") -> None:
        self.sums = ChannelSums(element, p, backend)
        self._asked: set[Any] = set()

    def clear(self) -> None:
        self.sums.clear()
        self._asked.clear()

    def refresh(self, group: Any, weights: Sequence[Tensor]) -> None:
        """Make sure that the sums of a group's parameters are of the values that they have now.

        The whole model is read at the first question, and whenever a group is asked for again: nothing tells of what
        was written through ``.data``.
        """
        root = (id(group[0].dep.target.module), group[0].dep.handler)
        if root in self._asked:
            self.clear()
        if not self._asked and group._DG is not None:
            self.sums.add(list(group._DG.model.parameters()))
        self._asked.add(root)
        changed = [w for w in weights if not self.sums.holds(w)]
        if changed:
            self.sums.add(changed)

    def values(self, parts: Sequence[tuple[Place, Sequence[Any]]]) -> list[Tensor]:
        """What :func:`places` named, as the float32 that Torch-Pruning reduces in."""
        return [_taken(self.sums.of(weight, dim).float(), index) for (weight, dim, index), _ in parts]


def reduced(importance: Any, values: list[Tensor], roots: list[Sequence[Any]]) -> Tensor | None:
    """Torch-Pruning's own reduction and normalisation of a group's parts."""
    if not values:
        return None
    return importance._normalize(importance._reduce(values, roots), importance.normalizer)


def places(
    importance: Any, group: Any, *, taylor: bool, every_norm: bool = False
) -> Iterator[tuple[Place, Sequence[Any]]]:
    """What of a group counts, as Torch-Pruning's Taylor or magnitude importance counts it, with the root's indices."""
    targets = tuple(importance.target_types)
    other = tp.prune_groupnorm_out_channels if taylor else tp.prune_batchnorm_out_channels
    counted = _OF_NORMS if every_norm else (other, tp.prune_layernorm_out_channels)
    for item in group.items:
        layer, prune = item.dep.target.module, item.dep.handler
        # Taylor sorts a layer's indices, and leaves the root's as they are.
        index, roots = (sorted(item.idxs) if taylor else item.idxs), item.root_idxs
        norm = prune in _OF_NORMS
        if not isinstance(layer, targets) and not (every_norm and isinstance(layer, _NORMS)):
            continue
        if prune in _IN:
            repeats = layer.groups if prune == tp.prune_conv_in_channels and layer.groups != layer.in_channels else 1
            dim = 0 if getattr(layer, "transposed", False) else 1
            yield (layer.weight, dim, _index(index, layer.weight.shape[dim], repeats)), roots
        elif prune in _OUT or (norm and prune in counted and layer.weight is not None):
            dim = 1 if getattr(layer, "transposed", False) else 0
            yield (layer.weight, dim, _index(index, layer.weight.shape[dim])), roots
            if importance.bias and layer.bias is not None:
                yield (layer.bias, 0, _index(index, len(layer.bias))), roots


def _index(index: Sequence[int], size: int, repeats: int = 1) -> Tensor | Sequence[int] | None:
    """None where all channels are meant, in their order. ``repeats``: a grouped convolution's inputs come so often."""
    if repeats > 1:
        return torch.as_tensor(index) % size
    return None if len(index) == size and index == list(range(size)) else index


def _taken(values: Tensor, index: Tensor | Sequence[int] | None) -> Tensor:
    return values if index is None else values[torch.as_tensor(index, device=values.device)]


__all__ = ["FusedImportance", "LookUp", "MissingGradient", "places", "reduced"]
