"""Images of a model or pipeline from a seed, and as PNG files; ``diffprune-fast sample``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..choices import Spacing
from .app import Device, Force, ModelDir, Ran, app, check_out, emptied, errors_in_one_line, say
from .loading import Opened, image_size, open_model

Labels = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Classes with commas between, used in turn. Default: all."),
]
Prompts = Annotated[Optional[Path], typer.Option(help="Of a pipeline from text: a file with a prompt on each line.")]  # noqa: UP045
Solver = Annotated[Optional[str], typer.Option(help="A scheduler of diffusers to sample with. Default: DDIM.")]  # noqa: UP045
DdimSpacing = Annotated[Spacing, typer.Option(help="Of DDIM's timesteps.")]


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

    def images(self, opened: Opened, seed: int) -> Any:
        """``(n, channels, height, width)`` in [-1, 1], on the CPU."""
        import torch

        from ..evaluation.own_samples import n_classes
        from ..evaluation.sampling import sample
        from ..objective.loss import dtype_of

        if opened.pipeline is not None:
            return self._of_pipeline(opened.pipeline, seed)
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
                noise.to(device, dtype_of(model)),
                steps=self.steps,
                labels=None if labels is None else labels.to(device),
                batch_size=self.batch_size,
                solver=self.solver,
                spacing=self.spacing,
            )
            .float()
            .cpu()
        )

    def _of_pipeline(self, pipe: Any, seed: int) -> Any:
        import torch

        from ..evaluation.sampling import sampler
        from ..objective.batches import images_of
        from ..pipelines.own_samples import own_batches

        if self.labels is not None:
            raise ValueError("--labels is for models alone: a pipeline of classes takes them in turn")
        if self.spacing != "uniform":
            raise ValueError("--spacing quadratic is for models alone")
        before = pipe.scheduler
        try:
            if self.solver is not None:
                pipe.scheduler = type(sampler(before, 1, self.solver)).from_config(before.config)
            made = own_batches(
                pipe, self.prompts, n=self.n, steps=self.steps, seed=seed, batch=self.batch_size, progress=False
            )
            return torch.cat([images_of(batch) for batch in made])
        finally:
            pipe.scheduler = before


def sampling_of(
    n: int, steps: int, batch_size: int, labels: str | None, prompts: Path | None, solver: str | None, spacing: Spacing
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
    return Sampling(n, steps, batch_size, numbers, texts, solver, spacing)


def _default(scheduler: Any) -> Any:
    from diffusers import DDPMScheduler

    return scheduler or DDPMScheduler()


def save_images(images: Any, folder: Path) -> None:
    """Every image as ``00000.png``, and all that fit on a screen side by side as ``grid.png``."""
    from PIL import Image

    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    if pixels.shape[-1] not in (1, 3):
        raise ValueError(f"the model makes {pixels.shape[-1]} channels, which is no picture: sample from its pipeline")
    pictures = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:05}.png")
    grid(pictures[:64]).save(folder / "grid.png")


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
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 64,
    scheduler: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the config of the scheduler that the model was trained with."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise: two models' images of one seed pair up.")] = 0,
    device: Device = None,
    force: Force = False,
) -> None:
    """Make images: every one as a PNG, and a grid of them."""
    with errors_in_one_line():
        ran = Ran(context)
        sampling = sampling_of(n, steps, batch_size, labels, prompts, solver, spacing)
        check_out(out, model_dir, force, empties=True)
        images = sampling.images(open_model(model_dir, None, scheduler, device), seed)
        save_images(images, emptied(out))
        ran.write(out, seed=seed)
        say(f"saved: {n} images and grid.png in {out}")
