"""The loss that a diffusion model was trained with, at given images, timesteps and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.denoisers import FLOAT_TIME, REVERSED, TOLD_SIGMA
from .conditioning import IMAGE_KEYS, Signature, config_of, is_autoencoder, read_batch, signature_of
from .nested import map_tensors, tensors_in

LossFunction = Callable[[nn.Module, Any, Tensor, Tensor], Tensor]


REDUCTIONS = ("mean", "none", "pixel_sum")


DEFAULT_TIMESTEPS = 1000


# The weight that latent diffusion models train their autoencoders with (Rombach et al., 2022, appendix G).
KL_WEIGHT = 1e-6


@dataclass(frozen=True)
class Objective:
    """A training loss. Made by :func:`make_objective`.

    kind: ``"epsilon"``, ``"v_prediction"``, ``"sample"``, ``"flow"``, ``"reconstruction"`` or ``"loss_fn"``.
    n_timesteps: timesteps are the integers ``0 <= t < n_timesteps``, 0 the least noisy; 1 where there is no time.
    signal, sigma: ``(n_timesteps,)``; the noisy image is ``signal[t] * image + sigma[t] * noise``.
    time: ``(n_timesteps,)``; what the model is told instead of ``t`` (flow matching), or None.
    """

    kind: str
    n_timesteps: int
    signal: Tensor | None = field(default=None, repr=False)
    sigma: Tensor | None = field(default=None, repr=False)
    time: Tensor | None = field(default=None, repr=False)
    loss_fn: LossFunction | None = None

    def noise(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise of the images' shape, on their device, drawn on the generator's (CPU: same numbers
        for every device)."""
        images = images_of(batch)
        device = generator.device if generator is not None else torch.device("cpu")
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        noise = torch.randn(images.shape, generator=generator, device=device, dtype=torch.float32)
        return noise.to(images.device, dtype, non_blocking=True)

    def on(self, device: torch.device) -> Objective:
        """The same with its tables on ``device`` (not on mps, which has no double precision), so that no timestep has
        to come back to the host to look itself up."""
        if device.type == "mps":
            return self
        signal, sigma, time = (x if x is None else x.to(device) for x in (self.signal, self.sigma, self.time))
        return replace(self, signal=signal, sigma=sigma, time=time)

    def loss(self, model: nn.Module, batch: Any, t: Tensor | int, noise: Tensor, *, reduction: str = "mean") -> Tensor:
        """The training loss of ``model``.

        batch: what the loader yields, on the model's device. t: ``(batch,)`` integers, or one for all images.
        noise: like the images. reduction: ``"mean"`` over everything; ``"none"``: ``(batch,)``, each sample's mean;
        ``"pixel_sum"``: sum over a sample, mean over the batch. A ``loss_fn`` that returns a scalar has only that.

        Raises ValueError where a conditioning input that the model needs is missing or the reduction is unknown.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {reduction!r}: one of {REDUCTIONS}")
        images = images_of(batch)
        t = torch.as_tensor(t, device=images.device).expand(len(images))
        if self.loss_fn is not None:
            return _reduced_already(self.loss_fn(model, batch, t, noise), reduction)
        if self.kind == "reconstruction":
            per_element = _reconstruction_error(model, read_batch(model, batch)[0])
        else:
            per_element = self._denoising_error(model, batch, t, noise)
        if reduction == "pixel_sum":
            return per_element.flatten(1).sum(1).mean()
        per_sample = per_element.flatten(1).mean(1)
        return per_sample if reduction == "none" else per_sample.mean()

    def noisy(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``signal[t] * image + sigma[t] * noise``, per sample."""
        signal, sigma = self._scales(images, t)
        return signal * images + sigma * noise

    def target(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the model should answer."""
        signal, sigma = self._scales(images, t)
        match self.kind:
            case "epsilon":
                return noise
            case "v_prediction":
                return signal * noise - sigma * images
            case "sample":
                return images
            case "flow":
                return noise - images
        raise ValueError(f"the objective {self.kind!r} has no denoising target")

    def _scales(self, images: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.signal is None or self.sigma is None:
            raise ValueError(f"the objective {self.kind!r} adds no noise")
        shape = (-1, *[1] * (images.ndim - 1))
        t = t.to(self.signal.device)
        return tuple(a[t].to(images.device, images.dtype).view(shape) for a in (self.signal, self.sigma))  # type: ignore[return-value]

    def _denoising_error(self, model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        images, inputs = read_batch(model, batch)
        dtype = dtype_of(model)
        # Half-precision models get half-precision inputs, but the loss is taken in at least single precision.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        images, noise = images.to(wide), noise.to(images.device, wide)
        inputs = map_tensors(inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)
        time = t if self.time is None else self.time[t.to(self.time.device)].to(images.device, dtype)
        time = time.to(dtype) if type(model).__name__.startswith(FLOAT_TIME) else time
        signature = signature_of(model)
        inputs[signature.sample] = self.noisy(images, t, noise).to(dtype)
        if signature.timestep is not None:
            inputs[signature.timestep] = time
        output = first_tensor(_called(model, inputs, signature)).to(wide)
        target = self.target(images, t, noise)
        if output.shape[1] == 2 * target.shape[1]:
            output = output.chunk(2, dim=1)[0]  # the second half is a learned variance (Nichol & Dhariwal, 2021)
        if output.shape != target.shape:
            raise ValueError(
                f"{type(model).__name__} answers {tuple(output.shape)} to images of {tuple(images.shape)}; "
                "pass loss_fn(model, batch, t, noise) for a model that doesn't answer with images"
            )
        return (output - target).square()


def _called(model: nn.Module, inputs: Mapping[str, Any], signature: Signature) -> Any:
    """The model's answer. A forward that trips over None lacks an input that its signature calls optional."""
    try:
        return model(**inputs)
    except (AttributeError, TypeError) as error:
        absent = sorted(signature.accepted - set(inputs))
        raise ValueError(
            f"{type(model).__name__}.forward failed: {error}. It was given {sorted(inputs)}; if it needs one of "
            f"{absent}, the loader's batches must be dicts that have it"
        ) from error
    except RuntimeError as error:
        if "must match" not in str(error):
            raise
        raise ValueError(_about_size(model, inputs[signature.sample], error)) from error


def _about_size(model: nn.Module, images: Tensor, error: Exception) -> str:
    """What a model says to images of a size that it can't halve as often as it has to, or has no positions for."""
    config = config_of(model)
    levels = len(config.get("block_out_channels") or ()) - 1
    size = "x".join(map(str, images.shape[2:]))
    fits = f"multiples of {2**levels}" if levels > 0 else f"its own size, {config.get('sample_size')}"
    return f"{type(model).__name__} can't take images of {size} ({error}): give {fits}"


def make_objective(model: nn.Module, scheduler: Any = None, loss_fn: LossFunction | None = None) -> Objective:
    """The objective of ``model``.

    An autoencoder is scored by its squared reconstruction error with 1e-6 of its KL divergence, or its commitment loss
    where it has a codebook.

    Args:
        model: a denoiser or an autoencoder.
        scheduler: a diffusers scheduler; its noise levels and ``prediction_type`` are used, its state is not. Flow
            matching is known by the class (``FlowMatch…``) or ``prediction_type="flow_prediction"``. None is
            ``DDPMScheduler()`` as it comes, 1000 linear steps that predict the noise.
        loss_fn: ``(model, batch, t, noise) -> (batch,) or scalar`` for everything else; ``batch`` is what the loader
            yields, ``t`` ``(batch,)`` integers.

    Returns:
        A loss that can be asked for at any timesteps and noise.

    Raises:
        ValueError: the scheduler's objective is not known, or the forward takes no timestep.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4)
        >>> objective = make_objective(unet, DDPMScheduler(prediction_type="v_prediction"))
        >>> objective.kind, objective.n_timesteps
        ('v_prediction', 1000)
        >>> images = torch.rand(2, 3, 8, 8) * 2 - 1
        >>> objective.loss(unet, images, 500, objective.noise(images), reduction="none").shape
        torch.Size([2])
    """
    if loss_fn is not None:
        return Objective("loss_fn", _count(scheduler), loss_fn=loss_fn)
    if is_autoencoder(model):
        return Objective("reconstruction", 1)
    if signature_of(model).timestep is None:
        raise ValueError(
            f"{type(model).__name__}.forward takes no timestep and is no autoencoder: "
            "pass loss_fn(model, batch, t, noise)"
        )
    if scheduler is None:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(num_train_timesteps=DEFAULT_TIMESTEPS)
    config = config_of(scheduler)
    kind = config.get("prediction_type") or "epsilon"
    if type(scheduler).__name__.startswith("FlowMatch") or kind == "flow_prediction" or config.get("use_flow_sigmas"):
        return _flow(type(model).__name__, config)
    signal2 = getattr(scheduler, "alphas_cumprod", None)
    if signal2 is None or kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"the training loss for {type(scheduler).__name__} (prediction_type={kind!r}) is not known: "
            "pass loss_fn(model, batch, t, noise), or the scheduler that the model was trained with"
        )
    signal2 = torch.as_tensor(signal2, dtype=torch.float64).cpu()
    return Objective(kind, len(signal2), signal2.sqrt(), (1 - signal2).sqrt())


def _count(scheduler: Any) -> int:
    config = config_of(scheduler)
    return int(config.get("num_train_timesteps") or DEFAULT_TIMESTEPS)


def _flow(model_class: str, config: Mapping[str, Any]) -> Objective:
    """Rectified flow: ``(1 - s) * image + s * noise``, target ``noise - image``; the model is told ``s * n`` or ``s``.

    The shift is the scheduler's; dynamic shifting (by resolution) is left out, as the scheduler itself does before
    ``set_timesteps``. Computed from the config: ``set_timesteps`` has replaced ``scheduler.sigmas`` in one in use.
    """
    if model_class.startswith(REVERSED):
        raise ValueError(f"{model_class} counts its time backwards: pass loss_fn(model, batch, t, noise)")
    n = int(config.get("num_train_timesteps") or DEFAULT_TIMESTEPS)
    s = torch.arange(1, n + 1, dtype=torch.float64) / n
    shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
    if not config.get("use_dynamic_shifting"):
        s = shift * s / (1 + (shift - 1) * s)
    return Objective("flow", n, 1 - s, s, time=s if model_class.startswith(TOLD_SIGMA) else s * n)


def _reconstruction_error(model: nn.Module, images: Tensor) -> Tensor:
    reconstruction, beside = reconstructed(model, images)
    error = (reconstruction - images.to(reconstruction.dtype)).square()
    return error if beside is None else error + beside.to(error.dtype).view(-1, *[1] * (error.ndim - 1))


def reconstructed(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What an autoencoder makes of ``images``, in at least single precision; and per image what its loss adds to the
    squared error, or None."""
    dtype = dtype_of(model)
    encoded = model.encode(images.to(dtype))  # type: ignore[operator]
    decoded = model.decode(latents_of(encoded))  # type: ignore[operator]
    reconstruction = first_tensor(decoded).to(torch.float64 if dtype == torch.float64 else torch.float32)
    posterior = getattr(encoded, "latent_dist", None)
    beside: Tensor | None = getattr(decoded, "commit_loss", None)
    if posterior is not None:
        # Both losses are sums over an image there, and the mean over the image's elements here.
        beside = KL_WEIGHT * posterior.kl() / reconstruction[0].numel()
    return reconstruction, beside


def latents_of(encoded: Any, generator: torch.Generator | None = None) -> Tensor:
    """The latents in an autoencoder's answer to ``encode``.

    generator: draws from the distribution that the encoder describes; None takes its mode.
    """
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        return first_tensor(encoded)
    return posterior.mode() if generator is None else posterior.sample(generator)


def _reduced_already(loss: Tensor, reduction: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim > 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar or one loss per sample, (batch,); it returned {shape}")
    return loss if reduction == "none" else loss.mean()


def images_of(batch: Any) -> Tensor:
    """The images in ``batch``, whatever its structure: by name in a dict, else the first floating-point tensor.

    Raises TypeError where there is none.
    """
    if isinstance(batch, Mapping):
        for key in IMAGE_KEYS:
            if isinstance(batch.get(key), Tensor):
                return batch[key]
    found = [x for x in tensors_in(batch) if x.ndim >= 2]
    if found:
        return next((x for x in found if x.is_floating_point()), found[0])
    raise TypeError(f"no image tensor in the loader's batch of type {type(batch).__name__}")


def first_tensor(output: Any) -> Tensor:
    """The tensor of a model's answer: itself, ``.sample``, or the first of a tuple or dict."""
    if isinstance(output, Tensor):
        return output
    sample = getattr(output, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"the model answers with {type(output).__name__}, which has no tensor to take the loss of")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
