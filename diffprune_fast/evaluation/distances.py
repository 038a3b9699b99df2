"""How far two sets of images are apart, in the features of a network."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Extractor = Callable[[Tensor], Tensor]

# Of the kernel distance: so many subsets of so many images, as usual (Binkowski et al., 2018).
SUBSETS, SUBSET = 100, 1000
# Of precision and recall: an image is like a set where it is no further from one of it than that one's third neighbour.
NEIGHBOURS = 3
INCEPTION, ONNX = "inception", ".onnx"


@dataclass(frozen=True)
class Reference:
    """The features of a set of images, ``(n, d)`` float32: measured once, saved, compared with again and again."""

    features: np.ndarray

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as ``.npz``."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, features=self.features)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reference:
        """Read what :meth:`save` wrote, running no code. Raises ValueError for another file."""
        try:
            with np.load(path, allow_pickle=False) as found:
                return cls(found["features"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} holds no features ({error}): remove it, and it is made anew") from error


def find_extractor(features: str | os.PathLike[str] | Extractor, device: torch.device | str = "cpu") -> Extractor:
    """A callable from images, ``(n, channels, height, width)`` in [-1, 1], to features ``(n, d)``.

    features: a callable, the path of a TorchScript or ONNX file, or ``"inception"`` (torchmetrics' InceptionV3 of the
    usual Fréchet distances, whose weights torch-fidelity downloads).

    Raises ValueError for a file that is neither, ModuleNotFoundError where onnxruntime, torchmetrics or its weights'
    package is lacking.
    """
    if callable(features):
        return features
    if str(features) == INCEPTION:
        return _inception(torch.device(device))
    if Path(features).suffix == ONNX:
        return _onnx(Path(features))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(features), map_location=device)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{features} is no TorchScript file: {str(error).splitlines()[0]}") from error
    return module.eval()


def _onnx(path: Path) -> Extractor:
    """The first output of an ONNX model, run on the CPU, in the precision of its input."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each reason, under no common one
        raise ValueError(f"{path} is no ONNX file that can be run: {str(error).splitlines()[0]}") from error
    given = session.get_inputs()[0]
    dtype = np.float16 if "float16" in given.type else np.float32

    def extract(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: images.cpu().numpy().astype(dtype)})[0])

    return extract


def _inception(device: torch.device) -> Extractor:
    from torchmetrics.image.fid import FrechetInceptionDistance

    network: Any = FrechetInceptionDistance(feature=2048).inception.to(device)

    def extract(images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return network(((colour.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))

    return extract


@torch.no_grad()
def extracted(extractor: Extractor, images: Tensor, *, batch_size: int = 128) -> Reference:
    """The features of ``images``, on the extractor's device.

    Raises ValueError where they are no finite ``(n, d)`` matrix.
    """
    weights = extractor.parameters() if isinstance(extractor, nn.Module) else iter(())
    device = next((p.device for p in weights), images.device)
    found = torch.cat([extractor(part.to(device)).float().cpu() for part in images.split(batch_size)])
    if found.ndim != 2 or not bool(found.isfinite().all()):
        raise ValueError(f"the extractor gives {tuple(found.shape)}, which is no finite matrix of (images, features)")
    return Reference(found.numpy())


def frechet_distance(a: Reference, b: Reference) -> float:
    """Distance of two normal distributions of these features' means and covariances; 0 for equal ones.

    With few images it is too large: compare figures of equally many only. Source: Heusel et al., 2017.

    Raises ValueError where the features differ in kind, or a set has less than two images.
    """
    _check_pair(a, b)
    means = [x.features.mean(0, dtype=np.float64) for x in (a, b)]
    first, second = (np.cov(x.features, rowvar=False, dtype=np.float64).reshape(len(means[0]), -1) for x in (a, b))
    # tr sqrt(AB) is the sum of the roots of the eigenvalues of sqrt(A) B sqrt(A), which is symmetric.
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(np.square(means[0] - means[1]).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def kernel_distance(a: Reference, b: Reference, *, seed: int = 0) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3; about 0 for equal distributions, without bias.

    The mean over 100 subsets of 1,000 images, or over all where there are fewer. Source: Binkowski et al., 2018.

    Raises ValueError as :func:`frechet_distance`.
    """
    _check_pair(a, b)
    size = min(SUBSET, len(a.features), len(b.features))
    whole = size == len(a.features) == len(b.features)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(1 if whole else SUBSETS):
        x, y = (s.features[rng.choice(len(s.features), size, replace=False)].astype(np.float64) for s in (a, b))
        xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (xx, yy))
        found.append(within - 2 * xy.mean())
    return float(np.mean(found))


def precision_and_recall(samples: Reference, reference: Reference, *, seed: int = 0) -> tuple[float, float]:
    """The share of samples that are like a reference image, and of reference images that are like a sample.

    Like: within the distance of an image to its third nearest neighbour in its own set. Both depend on how many images
    there are, so the larger set is cut to the smaller's number, at random.

    Source: Kynkäänniemi et al., 2019 (arXiv 1904.06991).

    Raises ValueError as :func:`frechet_distance`, and for less than five images in a set.
    """
    _check_pair(samples, reference)
    n = min(len(samples.features), len(reference.features))
    if n < NEIGHBOURS + 2:
        raise ValueError(f"precision and recall need {NEIGHBOURS + 2} images on each side, there are {n}")
    rng = np.random.default_rng(seed)
    a, b = (torch.from_numpy(x.features[rng.permutation(len(x.features))[:n]]) for x in (samples, reference))
    between = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    near_a, near_b = (
        torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(NEIGHBOURS + 1, dim=1).values
        for x in (a, b)
    )
    precision = (between <= near_b[None, :]).any(dim=1).double().mean()
    recall = (between <= near_a[:, None]).any(dim=0).double().mean()
    return float(precision), float(recall)


def _check_pair(a: Reference, b: Reference) -> None:
    if a.features.shape[1:] != b.features.shape[1:]:
        raise ValueError(
            f"features of {a.features.shape[1:]} and {b.features.shape[1:]} can't be compared: use one extractor"
        )
    if min(len(a.features), len(b.features)) < 2:
        raise ValueError("a distance needs at least two images on each side")
