"""The nearest pictures by embedding: python nearest.py preds.parquet nearest.png photos/0001.jpg photos/0007.jpg ...

preds.parquet comes from `dynamixer predict photos/ --model RUN --out preds.parquet --embeddings`.
"""

import sys

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

table, sheet, queries = pq.read_table(sys.argv[1]), sys.argv[2], sys.argv[3:]
names, labels = table["picture"].to_pylist(), table["label"].to_pylist()
vectors = np.array(table["embedding"].to_pylist(), dtype=np.float32)
vectors = vectors - vectors.mean(0)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

SIDE, GAP, TEXT, COLUMNS = 96, 8, 18, 8
canvas = Image.new("RGB", ((SIDE + GAP) * COLUMNS + 3 * GAP, (SIDE + TEXT + GAP) * len(queries) + GAP), "white")
draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
for row, query in enumerate(queries):
    order = (vectors @ vectors[names.index(query)]).argsort()[::-1][:COLUMNS]  # the first is the query itself
    for column, number in enumerate(order):
        left = GAP + column * (SIDE + GAP) + (GAP if column else 0)
        top = GAP + row * (SIDE + TEXT + GAP)
        canvas.paste(Image.open(names[number]).convert("RGB").resize((SIDE, SIDE)), (left, top))
        draw.text((left, top + SIDE + 2), labels[number], fill="black" if column else "firebrick", font=font)
canvas.save(sheet)
