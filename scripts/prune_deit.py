"""Prune a DeiT or ViT of timm with a few lines of Python: what `hwprune prune` does, to copy and change.

python scripts/prune_deit.py deit_tiny_patch16_224 --data DIR --budget 0.7 --out FOLDER [--weights FILE]

DIR holds class folders of images (or is a .tar of them); labels are read to compare accuracy alone.
"""

import argparse
import copy
from pathlib import Path

import timm
import torch

import hwprune
from hwprune.data import calibration_batches, evaluate, open_dataset
from hwprune.opening import read_state

words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
words.add_argument("model", help="timm name")
words.add_argument("--data", required=True, help="images to calibrate on and to evaluate on")
words.add_argument("--test", help="other images to evaluate on, so that the accuracy is held out")
words.add_argument("--budget", type=float, default=0.7, help="share of the MACs to keep")
words.add_argument("--out", required=True, help="folder to save to")
words.add_argument("--weights", type=Path, help="file of weights; without it, timm's own")
words.add_argument("--class-map", help="class names, one a line, in the order of the outputs")
words.add_argument("--images", type=int, default=256, help="calibration images")
asked = words.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dense = timm.create_model(asked.model, pretrained=asked.weights is None).eval()
if asked.weights:
    dense.load_state_dict(read_state(asked.weights))

# 1. Images, through the model's own transform. Calibration sees no label.
images = open_dataset(asked.data, dense, class_map=asked.class_map)
test = open_dataset(asked.test or asked.data, dense, class_map=asked.class_map)
batches = calibration_batches(images, images=asked.images, batch=32)

# 2. Prune a copy to the budget: choose what goes, cut it out, re-fit the rest in closed form.
pruned = copy.deepcopy(dense).to(device)
report = hwprune.prune(pruned, batches, hwprune.Budget(macs=asked.budget))
print(report)

# 3. What it kept, on the same images.
for name, model in (("dense", dense), ("pruned", pruned)):
    result = evaluate(model.to(device), test, batch=64, device=device)
    print(f"{name:>6}: top-1 {100 * result.top1:.2f} % on {result.images} images")

# 4. Save. It opens with hwprune.load(FOLDER), or with timm after `import hwprune`:
#    timm.create_model("local-dir:FOLDER", pretrained=True)
hwprune.save(pruned, asked.out)
print(f"saved {asked.out}")
