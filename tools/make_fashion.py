"""Make the embedded data set from Debian's package dataset-fashion-mnist: the first 1,000 and 200 pictures of each class.

apt-get install dataset-fashion-mnist
python tools/make_fashion.py [/usr/share/datasets/fashion-mnist]
"""

import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
HERE = Path(__file__).resolve().parents[1]


def idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def encode(picture: np.ndarray, kind: str, **options: int | bool) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind, **options)
    return out.getvalue()


def split(source: Path, prefix: str, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    pictures = idx(source / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = idx(source / f"{prefix}-labels-idx1-ubyte.gz", 8)
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
    return pictures[chosen], labels[chosen]


def write(path: Path, pictures: np.ndarray, labels: np.ndarray) -> None:
    rows = [{"bytes": encode(p, "WEBP", lossless=True, method=6, exact=True), "path": None} for p in pictures]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": image, "label": pa.array(labels, pa.int64())}).replace_schema_metadata(metadata)
    pq.write_table(table, path, compression="zstd", compression_level=19)


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist")
    target = HERE / "src/dynamixer/data/fashion"
    target.mkdir(exist_ok=True)
    write(target / "train.parquet", *split(source, "train", 1000))
    test_pictures, test_labels = split(source, "t10k", 200)
    write(target / "test.parquet", test_pictures, test_labels)
    for label, name in enumerate(CLASSES):
        example = test_pictures[np.flatnonzero(test_labels == label)[0]]
        out = HERE / "examples/pictures" / f"{name.lower().replace(' ', '-')}.png"
        out.write_bytes(encode(example, "PNG", optimize=True))


if __name__ == "__main__":
    main()
