import os
import warnings

import numpy as np
import pytest
from PIL import Image

from tokenfusion.cli.compare import images
from tokenfusion.cli.errors import UsageError


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    path = tmp_path / "image.tiff"
    Image.new("RGB", (4, 3), "white").convert(mode).save(path)
    (read,) = images.load([str(path)])
    image = read.image
    assert (read.name, image.mode, image.size, read.remark) == (str(path), "RGB", (4, 3), None)
    assert np.asarray(image).min() == 255


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)).save(path)
    (read,) = images.load([str(path)])
    assert np.asarray(read.image)[0, :, 0].tolist() == [0, 128, 255]


def test_rotation_of_the_camera_is_undone(tmp_path):
    path = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    Image.new("RGB", (4, 3)).save(path, exif=exif)
    (read,) = images.load([str(path)])
    assert read.image.size == (3, 4)


def test_default_photographs():
    pytest.importorskip("sklearn")
    assert [read.name for read in images.load([])] == ["china.jpg", "flower.jpg"]


@pytest.mark.parametrize(
    "shades, white",
    [
        (np.array([[0, 0.5, 1]], dtype=np.float32), 1),
        (np.array([[0, 127.5, 255]], dtype=np.float32), 255),
        (np.array([[0, 128, 255]], dtype=np.int32), 255),
        (np.array([[0, 0x8000, 0xFFFF]], dtype=np.int32), 0xFFFF),
    ],
)
def test_thirty_two_bit_grey_keeps_its_shades_and_says_what_white_is(tmp_path, shades, white):
    path = tmp_path / "grey.tiff"
    Image.fromarray(shades).save(path)
    (read,) = images.load([path])
    assert np.asarray(read.image)[0, :, 0].tolist() == [0, 128, 255]
    assert f"{white} is taken for white" in read.remark


@pytest.mark.parametrize("shades", [[-1.0, 1.0], [0.0, 1e6], [0.0, float("nan")]], ids=str)
def test_shades_without_a_known_white_are_an_error(tmp_path, shades):
    path = tmp_path / "grey.tiff"
    Image.fromarray(np.array([shades], dtype=np.float32)).save(path)
    with pytest.raises(UsageError, match=r"grey.tiff: shades from \S+ to \S+, expected 0 to 1, to 255 or to 65535"):
        images.load([str(path)])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe: not a regular file"):
        images.load([str(tmp_path / "pipe")])


@pytest.mark.parametrize("name, shown", [(b"caf\xe9.png", r"caf\xe9.png"), (b"a\x1b[1m\n.png", r"a\x1b[1m\n.png")])
def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path, name, shown):
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as file:
        Image.new("RGB", (4, 3)).save(file, "png")
    (read,) = images.load([os.fsdecode(path)])
    assert read.name == f"{tmp_path}/{shown}"


def test_metadata_and_size_are_no_reason_to_warn(tmp_path, monkeypatch):
    path = tmp_path / "palette.png"
    Image.new("P", (40, 30)).save(path, transparency=b"\x00\x10")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.load([str(path)])


@pytest.mark.parametrize("size, cut", [((20000, 1), (16, 1)), ((3, 101), (3, 49)), ((160, 10), (160, 10))])
def test_the_middle_of_a_long_image(size, cut):
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = images.middle(Image.fromarray((x + y).astype(np.int32)))
    assert image.size == cut
    ends = np.asarray(image)[0, 0], np.asarray(image)[-1, -1]
    assert abs(sum(ends) - (width + height - 2)) <= 1
