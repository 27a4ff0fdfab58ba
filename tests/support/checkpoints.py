"""Checkpoints that crossenc.testing has none of."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from crossenc.testing import tiny_checkpoint


def make_backbone(folder: Path) -> Path:
    """A folder with a tokenizer and a BERT without a head."""
    tiny_checkpoint(folder, max_length=512)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder
