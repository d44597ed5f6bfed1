"""Prune Stable Diffusion XL with a few lines of Python: what `hwprune prune-diffusion` does, to copy.

python scripts/prune_sdxl.py --prompts FILE --budget 0.8 --out FOLDER [--model FOLDER_OR_NAME]

Any pipeline of diffusers with a UNet or transformer hwprune knows will do; FILE has one prompt a line.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import hwprune
from hwprune.conditions import component_of, prompt_conditions

words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
words.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
words.add_argument("--prompts", type=Path, required=True, help="one a line")
words.add_argument(
    "--budget", type=float, default=0.8, help="share of the denoiser's parameters to keep"
)
words.add_argument("--out", required=True, help="folder to save the denoiser to")
words.add_argument("--steps", type=int, default=8, help="of the solver, while learning")
words.add_argument("--minutes", type=float, default=120, help="to learn in")
words.add_argument("--images", type=int, default=64, help="to learn from")
asked = words.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipeline = DiffusionPipeline.from_pretrained(asked.model, torch_dtype=dtype).to(device)

# 1. Encode the prompts by the pipeline itself; then the encoders and the VAE can go.
prompts = [line.strip() for line in asked.prompts.read_text().splitlines() if line.strip()]
conditions = prompt_conditions(pipeline, prompts, steps=asked.steps)
_, denoiser = component_of(pipeline)
del pipeline
denoiser.enable_gradient_checkpointing()  # less memory in each step, for a third more time

# 2. Learn what the final latents can do without, re-fit the rest in closed form, cut it out.
report = hwprune.prune_diffusion(
    denoiser,
    conditions,
    hwprune.Budget(params=asked.budget),
    images=asked.images,
    batch=1,
    minutes=asked.minutes,
    folder=f"{asked.out}.work",  # a killed run goes on from here
    watch=lambda at: print(
        f"{at.step}/{at.steps} loss {at.loss:.4g} price {at.price:.3f} {at.seconds_left / 60:.0f} min"
    ),
)
print(report)

# 3. Save. After `import hwprune` diffusers' own from_pretrained opens it:
#    DiffusionPipeline.from_pretrained(MODEL, unet=UNet2DConditionModel.from_pretrained(FOLDER))
hwprune.save(denoiser, asked.out)
print(f"saved {asked.out}")
