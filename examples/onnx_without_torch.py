"""Classify pictures with an exported model: python onnx_without_torch.py model.onnx picture.jpg ..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
about = json.loads(session.get_modelmeta().custom_metadata_map["dynamixer"])
how, classes = about["preprocessing"], about["classes"]
(height, width), resampling = how["size"], Image.Resampling[how["interpolation"].upper()]
assert height == width, "this example is for square pictures"

for name in sys.argv[2:]:
    try:
        picture = ImageOps.exif_transpose(Image.open(name)).convert("RGB")
    except Exception as error:  # Pillow has half a dozen kinds for a damaged file
        sys.exit(f"{name} cannot be read: {error}")
    side, shorter = int(height / how["crop_pct"]), min(picture.size)  # `side` before the centre is cut out
    picture = picture.resize([int(side * x / shorter) for x in picture.size], resampling)
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = (pixels - np.float32(how["mean"])) / np.float32(how["std"])
    (logits,) = session.run(["logits"], {"pictures": pixels.transpose(2, 0, 1)[None]})
    probabilities = np.exp(logits[0] - logits.max()) / np.exp(logits[0] - logits.max()).sum()
    best = probabilities.argsort()[::-1][:3]
    print(f"{name}: " + ", ".join(f"{classes[i]} {100 * probabilities[i]:.1f} %" for i in best))
