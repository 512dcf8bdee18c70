"""Corrupted test pictures for the study's table 6: the 19 kinds of the package imagecorruptions, at 5 severities, by seed.

    python benchmarks/corrupt.py --data cifar10/test.parquet --out cifar10-corrupted

The package wants an old NumPy and others of its time, so this script imports nothing of ours and has an environment of its own
(Python 3.11):

    python -m venv corrupt
    corrupt/bin/pip install imagecorruptions==1.1.2 numpy==1.26.4 scipy==1.11.4 scikit-image==0.21.0 \\
        opencv-python==4.8.1.78 numba==0.59.1 pillow==10.4.0 pyarrow==17.0.0 setuptools==69.5.1
    corrupt/bin/python benchmarks/corrupt.py --data cifar10/test.parquet --out cifar10-corrupted

Writes OUT/KIND-SEVERITY.parquet, each the same pictures (--pictures, as many of each class, drawn by --seed) in PNG, as
`dynamixer eval` reads them, and OUT/about.json; after a stop it goes on. The same arguments give the same pixels. Kinds,
severities and pictures are not those of the published CIFAR-10-C: figures are not comparable with it.
`dynamixer reproduce --corrupted OUT` measures with them.
"""

import argparse
import io
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLUMNS = ("image", "img")  # ours, and that of CIFAR-10 on the Hugging Face hub
SEVERITIES = range(1, 6)
PACKAGES = ("imagecorruptions", "numpy", "scipy", "scikit-image", "numba", "pillow")


def chosen(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Numbers of `count` pictures, as many of each class, in the order of the file."""
    classes = np.unique(labels)
    each, rest = divmod(count, len(classes))
    if rest:
        raise SystemExit(f"{count} pictures cannot be cut into {len(classes)} classes of equal size.")
    if short := [str(c) for c in classes if (labels == c).sum() < each]:
        raise SystemExit(f"there are not {each} pictures of class {short[0]}.")
    generator = np.random.default_rng(seed)
    return np.sort(np.concatenate([generator.permutation(np.flatnonzero(labels == c))[:each] for c in classes]))


def seed_of(seed: int, kind: str, severity: int, number: int) -> int:
    """A seed for one picture, of the arguments alone."""
    words = [seed, severity, number, *kind.encode()]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def read(path: Path) -> tuple[pa.Table, np.ndarray]:
    table = pq.read_table(path)
    if not {*COLUMNS} & {*table.column_names} or "label" not in table.column_names:
        raise SystemExit(f"{path} needs a column {' or '.join(COLUMNS)} (bytes, path), and one called label.")
    return table, table.column("label").to_numpy()


def column_of(table: pa.Table) -> str:
    return next(name for name in COLUMNS if name in table.column_names)


def pixels_of(table: pa.Table, number: int) -> np.ndarray:
    encoded = table.column(column_of(table))[number].as_py()["bytes"]
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def write(path: Path, table: pa.Table, numbers: np.ndarray, pictures: list[bytes]) -> None:
    """With the labels and class names of the original; put in place when whole."""
    images = [{"bytes": data, "path": f"{number:05d}.png"} for data, number in zip(pictures, numbers, strict=True)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        column_of(table): pa.array(images, kind),
        "label": table.column("label").take(pa.array(numbers)).combine_chunks(),
    }
    made = pa.table(columns).replace_schema_metadata(table.schema.metadata)
    aside = path.with_name(f".{path.name}")
    pq.write_table(made, aside)
    aside.replace(path)


def begin(out: Path, about: dict[str, Any]) -> None:
    """Note what the folder holds, or see that it is the same: what is there already is not made again."""
    path = out / "about.json"
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8")) != about:
        raise SystemExit(f"{out} was begun with other arguments or packages ({path}): give another --out.")


def corruption() -> tuple[list[str], Any]:
    """The names of the package's kinds, and a function (pixels, kind, severity, seed) -> pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import imagecorruptions  # type: ignore[import-not-found] # noqa: PLC0415 - of the old environment
        import numba  # type: ignore[import-not-found] # noqa: PLC0415
        import skimage  # type: ignore[import-not-found] # noqa: PLC0415
    blur, noise = skimage.filters.gaussian, skimage.util.random_noise

    def gaussian(picture: Any, *more: Any, multichannel: bool = False, **options: Any) -> Any:
        """By the name that the package uses, which scikit-image has changed since."""
        return blur(picture, *more, channel_axis=-1 if multichannel else None, **options)

    def random_noise(picture: Any, **options: Any) -> Any:
        """Drawing from the seeded state, like everything else."""
        return noise(picture, rng=int(np.random.randint(2**31)), **options)

    imagecorruptions.corruptions.gaussian = gaussian
    skimage.util.random_noise = random_noise

    @numba.njit  # type: ignore[untyped-decorator] # compiled code draws from a generator of its own
    def seed_compiled(seed: int) -> None:
        np.random.seed(seed)

    def run(pixels: np.ndarray, kind: str, severity: int, seed: int) -> np.ndarray:
        np.random.seed(seed)
        seed_compiled(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = imagecorruptions.corrupt(pixels, corruption_name=kind, severity=severity)
        return np.asarray(made, dtype=np.uint8)

    return list(imagecorruptions.get_corruption_names("all")), run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table, labels = read(options.data)
    numbers = chosen(labels, options.pictures, options.seed)
    kinds, run = corruption()
    begin(options.out, {"pictures": len(numbers), "seed": options.seed, **{name: version(name) for name in PACKAGES}})
    for kind in kinds:
        for severity in SEVERITIES:
            path = options.out / f"{kind}-{severity}.parquet"
            if not path.exists():
                seeds = [seed_of(options.seed, kind, severity, int(number)) for number in numbers]
                pictures = [
                    png(run(pixels_of(table, n), kind, severity, s)) for n, s in zip(numbers, seeds, strict=True)
                ]
                write(path, table, numbers, pictures)
                print(f"{kind} {severity}: {len(pictures)} pictures", file=sys.stderr)
    print(json.dumps({"out": str(options.out), "files": len(kinds) * len(SEVERITIES), "pictures": len(numbers)}))


if __name__ == "__main__":
    main()
