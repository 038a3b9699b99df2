"""A model card beside a saved model: what it is, what it cost and costs, how to load it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import CONFIG, MANIFEST, of_variant, read_manifest

CARD = "README.md"
TAG = "diffprune-fast"
INDEX = "model_index.json"


def write_card(
    directory: str | os.PathLike[str], *, command: str | None = None, figures: Mapping[str, str] | None = None
) -> Path:
    """Write ``README.md`` into a saved model's or pipeline's folder, as the hub shows it; gives its path.

    Args:
        directory: what ``save_pretrained`` wrote.
        command: how it was made, as a shell takes it.
        figures: what was measured, name to text.

    Returns:
        The card's path.

    Raises:
        ValueError: the folder holds no model.

    Example:
        >>> import tempfile, torch
        >>> from diffprune_fast import score_and_prune
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 2)), (torch.zeros(1, 4),)
        >>> result = score_and_prune(model, None, criterion="magnitude", ratio=0.5, example_inputs=x)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     result.save_pretrained(directory)
        ...     text = write_card(directory, command="python mine.py").read_text(encoding="utf-8")
        >>> "python mine.py" in text
        True
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(directory)
    manifests, _ = _manifests(folder)
    kind = _kind(folder, manifests)
    data = ModelCardData(library_name="diffusers", tags=[TAG, "pruning", "diffusion"])
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(kind, folder, manifests, command, figures or {})}")
    card.save(folder / CARD)
    return folder / CARD


def how_to_load(folder: Path, where: str | None = None) -> str:
    """The lines of Python that load what is in ``folder``. where: the place to name in them, if it is another."""
    manifests, variant = _manifests(folder)
    name, place = _kind(folder, manifests), repr(where or str(folder))
    place += "" if variant is None else f", variant={variant!r}"
    plain = all(m["plain_config"] for m in manifests)
    is_pipeline = (folder / INDEX).exists()
    if plain and (is_pipeline or (folder / CONFIG).exists()):
        return f"from diffusers import {name}\n\nmodel = {name}.from_pretrained({place})"
    if is_pipeline:
        return f"from diffprune_fast import pipeline_from_pretrained\n\nmodel = pipeline_from_pretrained({place})"
    return f"from diffprune_fast import from_pretrained\n\nmodel = from_pretrained({place})"


def _manifests(folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The model's, or its components', and the variant that they are of where there are no plain ones."""
    of_variants = of_variant(MANIFEST, "*")
    for pattern in (MANIFEST, f"*/{MANIFEST}", of_variants, f"*/{of_variants}"):
        if paths := sorted(folder.glob(pattern)):
            variant = paths[0].name.removesuffix(".json").partition(".")[2] or None
            alike = [path.parent for path in paths if path.name == paths[0].name]
            return [read_manifest(parent, variant) for parent in alike], variant
    return [], None


def _kind(folder: Path, manifests: list[dict[str, Any]]) -> str:
    for name in (INDEX, CONFIG):
        if (folder / name).exists():
            return str(json.loads((folder / name).read_text(encoding="utf-8"))["_class_name"])
    if not manifests:
        raise ValueError(f"{folder} holds no model: save one there first")
    return str(manifests[0]["model_class"])


def _body(
    kind: str, folder: Path, manifests: list[dict[str, Any]], command: str | None, figures: Mapping[str, str]
) -> str:
    parts = [f"# {kind}{', pruned' if manifests else ''}", *map(_of_manifest, manifests)]
    if figures:
        parts.append("## Measured\n\n" + "\n".join(f"- {name}: {text}" for name, text in figures.items()))
    parts.append(f"## How to load it\n\n```python\n{how_to_load(folder, '.')}\n```")
    if command is not None:
        parts.append(f"## How it was made\n\n```\n{command}\n```")
    return "\n\n".join(parts) + "\n"


def _of_manifest(manifest: Mapping[str, Any]) -> str:
    before, after = manifest.get("before", {}), manifest.get("after", {})
    lines = [
        f"A {manifest['model_class']} from which whole channels were removed with diffprune_fast.",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    for key, name in (("params", "parameters"), ("macs", "MACs")):
        if key in before and key in after:
            share = 100 * after[key] / max(before[key], 1)
            lines.append(f"| {name} | {before[key]:,} | {after[key]:,} ({share:.0f}%) |")
    lines += [""] + [f"- {name}: {text}" for name, text in facts_of(manifest).items()]
    return "\n".join(lines)


def facts_of(about: Mapping[str, Any]) -> dict[str, str]:
    """What a manifest says of how a model was pruned, as lines of a table."""
    facts: dict[str, str] = {}
    budget, scores, solved = (about.get(key) or {} for key in ("budget", "scores", "compensation"))
    if budget:
        facts |= {"asked for": budget["asked"], "met": budget["met"], "ranking": budget["ranking"]}
        facts |= {f"note {i + 1}": note for i, note in enumerate(budget.get("notes", ()))}
    if scores:
        facts["scores"] = f"{scores['criterion']}, estimator {scores['estimator']}, {scores['samples']} samples"
        if scores.get("agreement") is not None:
            facts["split-half agreement"] = f"{scores['agreement']:.3f} (two halves of the samples, same kept units)"
    if solved and solved.get("layers"):
        stages = ", ".join(f"{s} {solved[s]:.4g}" for s in ("dense", "sliced", "compensated") if solved.get(s))
        facts["losses before any training"] = f"{stages} ({solved['samples']} samples)"
    if about.get("blocks_dropped"):
        facts["blocks dropped"] = ", ".join(about["blocks_dropped"])
    if about.get("own_samples"):
        facts["without data"] = f"from {about['own_samples']} images that the model made itself"
    if about.get("seed") is not None:
        facts["seed"] = str(about["seed"])
    return facts
