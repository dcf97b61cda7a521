"""Images with instances out of a COCO JSON, as nuImages has them: what a segmenter learns from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from data.reading.augment import draw_image_matrices
from data.reading.coco_json import CocoError, category_labels
from data.reading.config import ImageConfig
from data.reading.dataset import SampleKey
from data.reading.instances import ImageInstances, InstanceBatch, mask_runs, warp_masks
from data.reading.sensors import load_image


class ImageSample(NamedTuple):
    """What the dataset returns; the shapes are those of ImageBatch without B."""

    token: str
    image_id: int
    image: Tensor
    instances: ImageInstances
    image_aug: Tensor
    raw_size: tuple[int, int]


@dataclass
class ImageBatch:
    """B images. Instances are what the network's image shows of the truth; their labels, positions in the classes."""

    tokens: list[str]  # names of the files
    image_ids: list[int]  # in the JSON
    images: Tensor  # [B, 3, H, W] uint8, RGB
    instances: InstanceBatch
    image_aug: Tensor  # [B, 3, 3] float64, raw pixels -> network pixels
    raw_sizes: list[tuple[int, int]]  # height, width

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ImageBatch:
        """The batch on a device; matrices stay on the CPU."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageBatch:
        """The batch in page-locked memory; the loader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> ImageBatch:
        return replace(self, images=function(self.images), instances=self.instances.map(function))


class _Image(NamedTuple):
    """An image of the JSON."""

    number: int
    file: str
    size: tuple[int, int]  # height, width
    labels: list[int]
    masks: list[bytes]


class CocoInstances(Dataset[ImageSample]):
    """The images of a COCO JSON in its order, augmented in training as the cameras of a keyframe are.

    Categories have names of `classes`, or are nuScenes categories of a detection class among them; other categories,
    crowds and what has a box and no mask are left out. Images without instances stay.
    """

    def __init__(
        self,
        file: Path | str,
        root: Path | str,
        config: ImageConfig,
        classes: Sequence[str | None],
        *,
        train: bool,
        seed: int = 0,
    ) -> None:
        """Read a JSON.

        Args:
            file: the JSON.
            root: folder that its `file_name`s are relative to.
            config: size of the network's image, and in training how it is augmented.
            classes: what labels are positions in; None is no class of the JSON.
            train: whether to augment.
            seed: of the augmentation.

        Raises:
            CocoError: it is absent, no COCO JSON, none of its categories is one of the classes, or a mask does not fit
                its image.
        """
        self.file, self.root, self.config, self.train, self.seed = Path(file), Path(root), config, train, seed
        try:
            self._images = _parse(json.loads(self.file.read_bytes()), classes)
        except OSError as error:
            raise CocoError(f"{file} cannot be read ({error.strerror}): see data.instances in params.yaml") from error
        except KeyError as error:
            raise CocoError(f"{file} is no COCO JSON of instances: it lacks {error}") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise CocoError(f"{file}: {error}") from error
        cv2.setNumThreads(0)  # the loader's workers are the parallelism

    def __len__(self) -> int:
        return len(self._images)

    @property
    def tokens(self) -> list[str]:
        """Names of the image files by index."""
        return [image.file for image in self._images]

    def __getitem__(self, key: SampleKey | int) -> ImageSample:
        """The image of a key; a plain index means epoch 0 and the position of that index.

        Raises:
            BlobError: the file is missing or broken.
        """
        epoch, position, index = (0, key, key) if isinstance(key, int) else key
        rng = np.random.default_rng((self.seed, epoch, position)) if self.train else None
        entry, size = self._images[index], self.config.size
        matrix = draw_image_matrices(np.array([entry.size]), self.config, rng)[0]
        bgr = load_image(self.root / entry.file, entry.file, entry.size, matrix, size)
        kept, masks, boxes = warp_masks(entry.masks, entry.size, matrix, size)
        labels = torch.tensor(entry.labels, dtype=torch.int64)[kept]
        instances = ImageInstances(torch.from_numpy(boxes), labels, torch.ones(len(kept)), torch.from_numpy(masks))
        image = torch.from_numpy(np.ascontiguousarray(bgr[..., ::-1].transpose(2, 0, 1)))
        return ImageSample(entry.file, entry.number, image, instances, torch.from_numpy(matrix), entry.size)


def collate_images(samples: Sequence[ImageSample]) -> ImageBatch:
    """Stack what has one shape, list what is ragged."""
    return ImageBatch(
        tokens=[sample.token for sample in samples],
        image_ids=[sample.image_id for sample in samples],
        images=torch.stack([sample.image for sample in samples]),
        instances=InstanceBatch.of([sample.instances for sample in samples]),
        image_aug=torch.stack([sample.image_aug for sample in samples]),
        raw_sizes=[sample.raw_size for sample in samples],
    )


def _parse(content: dict[str, Any], classes: Sequence[str | None]) -> list[_Image]:
    """The images of a JSON with the instances of known classes."""
    images = {entry["id"]: _image(entry) for entry in content["images"]}
    if not images:
        raise ValueError("it has no images")
    labels = category_labels(content["categories"], classes)
    for entry in content["annotations"]:
        label = labels.get(entry["category_id"])
        if label is None or entry.get("iscrowd") or entry["segmentation"] is None:
            continue
        if entry["image_id"] not in images:
            raise ValueError(f"annotation {entry['id']} is of image {entry['image_id']}, which it does not have")
        image = images[entry["image_id"]]
        try:
            image.masks.append(_mask(entry["segmentation"], image.size))
        except ValueError as error:
            raise ValueError(f"annotation {entry['id']} of {image.file}: {error}") from error
        image.labels.append(label)
    return list(images.values())


def _image(entry: dict[str, Any]) -> _Image:
    file, size = entry["file_name"], (int(entry["height"]), int(entry["width"]))
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise ValueError(f"file_name {file!r} of image {entry['id']} leaves the folder of the images")
    return _Image(int(entry["id"]), file, size, [], [])


def _mask(segmentation: Any, size: tuple[int, int]) -> bytes:
    """A compressed run-length encoding out of one, out of counts or out of polygons."""
    if isinstance(segmentation, list):
        if not segmentation or any(len(polygon) < 6 for polygon in segmentation):
            raise ValueError("a segmentation of no polygon, or of one with fewer than three corners")
        merged: bytes = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))["counts"]
        return merged
    if list(segmentation["size"]) != list(size):
        raise ValueError(f"a mask of size {segmentation['size']} in an image of {list(size)}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if any(count < 0 for count in counts) or sum(counts) != size[0] * size[1]:
            raise ValueError(f"a mask does not cover {size[0]} x {size[1]} pixels")
        coded: bytes = coco_mask.frPyObjects(segmentation, *size)["counts"]
        return coded
    rle = counts.encode() if isinstance(counts, str) else counts
    mask_runs([rle], size)
    return rle
