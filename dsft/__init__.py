"""dsft: supervised fine-tuning on DeepSpeed that gives the same answer however it is split."""

import os

import torch

__version__ = "0.1.0"

if not torch.accelerator.is_available():
    # DeepSpeed looks for an accelerator as soon as it is imported, and warns where it finds none
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
