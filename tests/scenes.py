"""Small scenes in MTAN's layout: blocks of one class each, whose colour tells class, depth and direction."""

from pathlib import Path

import numpy as np

BLOCK = 8


def write_scenes(folder, train=6, val=2, size=(32, 64), classes=13, labels="label", instance=False, seed=0) -> Path:
    """Writes them; returns the folder.

    The first channel of an image is label / classes, before a block of each kind is made invalid; the other two vary
    smoothly with the pixel's row and column, which depth and the offsets to the instances' centres follow.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    directions = rng.normal(size=(classes, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    for split, count in {"train": train, "val": val}.items():
        for name in ("image", labels, "depth", "normal", *(["instance"] if instance else [])):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            grid = rng.integers(classes, size=(height // BLOCK, width // BLOCK))
            label = grid.repeat(BLOCK, 0).repeat(BLOCK, 1)
            image = np.stack([label / classes, rows / height, columns / width], -1)
            depth = 1 + 2 * label / classes + rows / height
            normal = directions[label]
            centres = np.stack([rows // BLOCK, columns // BLOCK], -1) * BLOCK + (BLOCK - 1) / 2
            offsets = np.where(label[..., None] < classes // 2, np.stack([rows, columns], -1) - centres, 250)
            holes = [(slice(y, y + BLOCK), slice(x, x + BLOCK)) for y, x in rng.integers(0, height - BLOCK, (3, 2))]
            label[holes[0]], depth[holes[1]], normal[holes[2]] = -1, 0, 0
            maps = {"image": image, labels: label, "depth": depth[..., None], "normal": normal, "instance": offsets}
            for name, values in maps.items():
                if (folder / split / name).is_dir():
                    np.save(folder / split / name / f"{i}.npy", values.astype(np.float32))
    return folder
