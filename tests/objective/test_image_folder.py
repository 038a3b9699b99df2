"""Pictures as they are found: of 16 bits, turned, transparent, of palettes, huge, broken, with captions and classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffprune_fast.objective.image_folder import ImageFolder


def read(folder, name, size=(4, 4), channels=3):
    reader = ImageFolder(folder, size, channels)
    return reader.read(folder / name)


def save(folder, name="a.png", color=(255, 0, 0), mode="RGB", size=(4, 4), **options):
    Image.new(mode, size, color).save(folder / name, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, channels):
    ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    image = read(tmp_path, "a.png", channels=channels)
    expected = torch.from_numpy(ramp.astype(np.float32) / 32767.5 - 1)
    torch.testing.assert_close(image, expected.expand(channels, 4, 4), atol=1e-4, rtol=0)


def test_exif_says_how_a_picture_is_turned(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 255  # the upper row
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: it becomes the right column
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read(tmp_path, "a.png")
    assert (image[:, :, 3] == 1).all()
    assert (image[:, :, :3] == -1).all()


@pytest.mark.parametrize(("mode", "color"), [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))])
def test_transparent_pixels_are_white(tmp_path, mode, color):
    save(tmp_path, mode=mode, color=color)
    assert (read(tmp_path, "a.png") == 1).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    save(tmp_path, mode="RGBA", color=(0, 0, 0, 51))
    torch.testing.assert_close(read(tmp_path, "a.png"), torch.full((3, 4, 4), 0.6), atol=0.01, rtol=0)


def test_a_palettes_entries_are_colours(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    torch.testing.assert_close(read(tmp_path, "a.png")[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_a_palettes_transparent_entry_is_white(tmp_path):
    Image.new("P", (4, 4), 0).save(tmp_path / "a.png", transparency=0)
    assert (read(tmp_path, "a.png") == 1).all()


def test_huge_images_are_refused_by_name(tmp_path, monkeypatch):
    save(tmp_path, size=(20, 20))
    for most in (300, 100):  # Pillow warns of the first and raises for the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(ValueError, match=r"a.png is too large for a picture"):
            read(tmp_path, "a.png")


def test_unreadable_files_are_skipped_and_counted_when_asked(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path, name)
    (tmp_path / "c.png").write_bytes(b"nothing")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "d.png").write_bytes(whole[: len(whole) - 20])
    with pytest.raises(ValueError, match="can't be read as an image"):
        list(ImageFolder(tmp_path, (4, 4)))
    folder = ImageFolder(tmp_path, (4, 4), skip_unreadable=True)
    assert [path.name for path in folder.skipped] == ["c.png", "d.png"]
    assert torch.cat(list(folder)).shape == (2, 3, 4, 4)


def test_images_of_all_sizes_make_one_batch(tmp_path):
    for i, size in enumerate([(3, 9), (9, 3), (40, 41), (1, 1)]):
        save(tmp_path, f"{i}.png", size=size)
    (batch,) = ImageFolder(tmp_path, (6, 5))
    assert batch.shape == (4, 3, 6, 5)


def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    for i, name in enumerate(["dog", "cat", "bird"]):
        (tmp_path / name / "deeper").mkdir(parents=True)
        save(tmp_path / name / "deeper", f"{i}.png", color=(60 * i, 0, 0))
    ((images, labels),) = ImageFolder(tmp_path, (4, 4), labels=True)
    red = ((images[:, 0, 0, 0] + 1) * 127.5).round().long() // 60
    assert [("dog", "cat", "bird")[i] for i in red] == [("bird", "cat", "dog")[i] for i in labels]
    save(tmp_path, "alone.png")
    with pytest.raises(ValueError, match=r"alone.png is in no class"):
        ImageFolder(tmp_path, (4, 4), labels=True)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_are_read_from_metadata(tmp_path, name):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in", "a.png")
    entry = {"file_name": "in/a.png", "text": 'a "red" square, flat'}
    as_csv = 'file_name,text\nin/a.png,"a ""red"" square, flat"\n'
    (tmp_path / name).write_text(json.dumps(entry) if name.endswith("jsonl") else as_csv)
    ((_, captions),) = ImageFolder(tmp_path, (4, 4), captions=True)
    assert captions == [entry["text"]]


def test_a_loader_for_training_shuffles_every_pass_and_sees_every_image(tmp_path):
    for i in range(8):
        save(tmp_path, f"{i}.png", color=(i, i, i))
    loader = ImageFolder(tmp_path, (4, 4), batch_size=4).shuffled()
    first, second = (torch.cat(list(loader))[:, 0, 0, 0].tolist() for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second)
    assert len({*first}) == 8
