"""Which pixels speak for a class: captum's methods on a DynaMixer, in one picture.

pip install '.[explain]'
python examples/attribution.py photo.jpg runs/first attribution.png
"""

import sys

import numpy as np
import torch
from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam, Occlusion
from matplotlib.figure import Figure

import dynamixer
from dynamixer.data import decode

image, run, out = sys.argv[1:]
checkpoint = dynamixer.load(run)
model, prepare = checkpoint.model, checkpoint.preprocessing
x = prepare(decode(image))[None].requires_grad_()
logits = model(x).detach()
best = int(logits.argmax())

# From the mean colour to the picture, along a straight line. What the pixels get adds up to what the logit gains.
pixels = IntegratedGradients(model).attribute(x, target=best, n_steps=100, internal_batch_size=20)
with torch.no_grad():
    gain = float(logits[0, best] - model(torch.zeros_like(x))[0, best])
print(
    f"{checkpoint.classes[best]}: the logit gains {gain:.3f}, integrated gradients add up to {float(pixels.detach().sum()):.3f}"
)

# What the logit loses when a square of the picture is covered.
side = x.shape[-1] // 8
covered = Occlusion(model).attribute(
    x, sliding_window_shapes=(3, 2 * side, 2 * side), strides=(3, side, side), target=best, perturbations_per_eval=32
)

# Grad-CAM wants maps [B, C, H, W], which is what the pooling before the classifier reads (blocks are channels last).
maps = LayerGradCam(model, model.global_pool).attribute(x, target=best, attribute_to_layer_input=True)
maps = LayerAttribution.interpolate(maps, x.shape[-2:], "bilinear")

mean, std = (torch.tensor(values)[:, None, None] for values in (prepare.mean, prepare.std))
picture = (x[0].detach() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
figure = Figure(figsize=(10, 3), layout="constrained")
found = {"integrated gradients": pixels, "occlusion": covered, "Grad-CAM": maps}
panels = figure.subplots(1, 4)
panels[0].imshow(picture)
panels[0].set_title(f"{checkpoint.classes[best]} {100 * float(logits.softmax(1)[0, best]):.0f} %")
for panel, (name, attribution) in zip(panels[1:], found.items(), strict=True):
    values = attribution[0].sum(0).detach().numpy()
    most = np.quantile(np.abs(values), 0.99)
    panel.imshow(picture.mean(-1), cmap="gray", alpha=0.5)
    panel.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.7)  # red speaks for the class, blue against it
    panel.set_title(name)
for panel in panels:
    panel.axis("off")
figure.savefig(out, dpi=120)
