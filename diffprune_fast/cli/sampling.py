"""Images of a model or pipeline from a seed, and as PNG files; ``diffprune-fast sample``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..choices import Cache, Spacing
from .app import Device, Force, ModelDir, Ran, app, check_out, emptied, errors_in_one_line, say
from .loading import Opened, device_of, image_size, open_model

ON_A_SCREEN = 64

Labels = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Classes with commas between, used in turn. Default: all."),
]
Prompts = Annotated[Optional[Path], typer.Option(help="Of a pipeline from text: a file with a prompt on each line.")]  # noqa: UP045
Solver = Annotated[Optional[str], typer.Option(help="A scheduler of diffusers to sample with. Default: DDIM.")]  # noqa: UP045
DdimSpacing = Annotated[Spacing, typer.Option(help="Of DDIM's timesteps.")]
Cached = Annotated[
    Optional[Cache],  # noqa: UP045
    typer.Option(help="Of diffusers, for transformers: leave out what changes little from step to step."),
]


@dataclass(frozen=True)
class Sampling:
    """How images are made: the same seed gives two models the same noise."""

    n: int
    steps: int
    batch_size: int = 64
    labels: tuple[int, ...] | None = None
    prompts: tuple[str, ...] | None = None
    solver: str | None = None
    spacing: Spacing = "uniform"
    cache: Cache | None = None

    def images(self, opened: Opened, seed: int, rows: slice = slice(None)) -> Any:
        """``(n, channels, height, width)`` in [-1, 1], on the CPU; of all n, those ``rows``."""
        import torch

        from ..evaluation.own_samples import n_classes
        from ..evaluation.sampling import sample
        from ..objective.loss import dtype_of

        if opened.pipeline is not None:
            return self._of_pipeline(opened, seed)[rows]
        if self.prompts is not None:
            raise ValueError("--prompts is for pipelines from text: this is a model alone")
        model, device = opened.model, next(opened.model.parameters()).device
        channels, shape = image_size(model, None)
        noise = torch.randn(self.n, channels, *shape, generator=torch.Generator().manual_seed(seed))
        classes = n_classes(model)
        chosen = self.labels or (None if classes is None else tuple(range(classes)))
        if self.labels is not None and (classes is None or max(self.labels) >= classes or min(self.labels) < 0):
            raise ValueError(f"--labels: the model has {'no' if classes is None else classes} classes")
        labels = None if chosen is None else torch.tensor([chosen[i % len(chosen)] for i in range(self.n)])
        return (
            sample(
                model,
                _default(opened.scheduler),
                noise[rows].to(device, dtype_of(model)),
                steps=self.steps,
                labels=None if labels is None else labels[rows].to(device),
                batch_size=self.batch_size,
                solver=self.solver,
                spacing=self.spacing,
                cache=self.cache,
            )
            .float()
            .cpu()
        )

    def _of_pipeline(self, opened: Opened, seed: int) -> Any:
        import torch

        from ..evaluation.caching import cached
        from ..evaluation.sampling import sampler
        from ..objective.batches import images_of
        from ..pipelines.components import find_component
        from ..pipelines.own_samples import own_batches

        if self.labels is not None:
            raise ValueError("--labels is for models alone: a pipeline of classes takes them in turn")
        if self.spacing != "uniform":
            raise ValueError("--spacing quadratic is for models alone")
        if self.cache is not None and self.steps == 1:
            raise ValueError(f"--cache {self.cache}: a single step has no former one")
        pipe = opened.pipeline
        before = pipe.scheduler
        try:
            if self.solver is not None:
                pipe.scheduler = type(sampler(before, 1, self.solver)).from_config(before.config)
            made = own_batches(
                pipe, self.prompts, n=self.n, steps=self.steps, seed=seed, batch=self.batch_size, progress=False
            )
            with cached(find_component(pipe)[1], self.cache):
                return torch.cat([images_of(batch) for batch in made])
        finally:
            pipe.scheduler = before


def sampling_of(
    n: int,
    steps: int,
    batch_size: int,
    labels: str | None,
    prompts: Path | None,
    solver: str | None,
    spacing: Spacing,
    cache: Cache | None = None,
) -> Sampling:
    """The options of the command line, checked. Raises ValueError."""
    from ..evaluation.sampling import scheduler_class

    if min(n, steps, batch_size) < 1:
        raise ValueError(f"--n {n}, --steps {steps} and --batch-size {batch_size}: each must be at least 1")
    if solver is not None:
        scheduler_class(solver)
    try:
        numbers = None if labels is None else tuple(int(x) for x in labels.split(","))
    except ValueError:
        raise ValueError(f"--labels {labels}: give numbers with commas between, such as 0,3,7") from None
    texts = None
    if prompts is not None:
        texts = tuple(line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip())
        if not texts:
            raise ValueError(f"--prompts {prompts}: there is no line of text in it")
    return Sampling(n, steps, batch_size, numbers, texts, solver, spacing, cache)


def _default(scheduler: Any) -> Any:
    from diffusers import DDPMScheduler

    return scheduler or DDPMScheduler()


def save_images(images: Any, folder: Path, first: int = 0) -> None:
    """Every image as ``00000.png``, or from another number on, and those that fit on a screen as ``grid.png``."""
    from PIL import Image

    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    if pixels.shape[-1] not in (1, 3):
        raise ValueError(f"the model makes {pixels.shape[-1]} channels, which is no picture: sample from its pipeline")
    pictures = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{first + i:05}.png")
    if first == 0:
        grid(pictures[:ON_A_SCREEN]).save(folder / "grid.png")


def grid(pictures: list[Any], columns: int = 8) -> Any:
    """Pictures of one size, row by row."""
    from PIL import Image

    width, height = pictures[0].size
    across = min(columns, len(pictures))
    whole = Image.new(pictures[0].mode, (across * (width + 1) - 1, -(-len(pictures) // across) * (height + 1) - 1))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % across * (width + 1), i // across * (height + 1)))
    return whole


@app.command()
def sample(
    context: typer.Context,
    model_dir: ModelDir,
    out: Annotated[Path, typer.Option(help="Folder for the images and grid.png.")],
    n: Annotated[int, typer.Option(help="Images.")] = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    labels: Labels = None,
    prompts: Prompts = None,
    solver: Solver = None,
    spacing: DdimSpacing = "uniform",
    cache: Cached = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 64,
    scheduler: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the config of the scheduler that the model was trained with."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise: two models' images of one seed pair up.")] = 0,
    device: Device = None,
    force: Force = False,
) -> None:
    """Make images: every one as a PNG, and a grid of them. Several processes (accelerate launch) share them out."""
    with errors_in_one_line():
        ran = Ran(context)
        sampling = sampling_of(n, steps, batch_size, labels, prompts, solver, spacing, cache)
        rank, ranks, wait = processes(device)
        if rank == 0:
            check_out(out, model_dir, force, empties=True)
        opened = open_model(model_dir, None, scheduler, device)
        if rank == 0:
            emptied(out)
        wait()
        # Whole batches, so that every image is made beside the same others as by one process.
        batches = -(-n // batch_size)
        first, stop = (min(n, batch_size * (batches * k // ranks)) for k in (rank, rank + 1))
        if first < stop:
            save_images(sampling.images(opened, seed, slice(first, stop)), out, first)
        wait()
        if rank == 0:
            if stop < min(n, ON_A_SCREEN):
                _regrid(out, n)
            ran.write(out, seed=seed, processes=ranks)
            say(f"saved: {n} images and grid.png in {out}")


def processes(device: str | None) -> tuple[int, int, Callable[[], None]]:
    """This process's number, how many accelerate launch or torchrun started, and what waits for all of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=device_of(device).type == "cpu")
    return state.process_index, state.num_processes, state.wait_for_everyone


def _regrid(folder: Path, n: int) -> None:
    """The grid of images that several processes have made."""
    from PIL import Image

    grid([Image.open(folder / f"{i:05}.png") for i in range(min(n, ON_A_SCREEN))]).save(folder / "grid.png")
