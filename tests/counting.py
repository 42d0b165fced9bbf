"""A toy language that a head can learn, its target, and texts in it: for the tests of `specfx train mtp`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny import VOCAB, tiny_model

from specfx.drafters.mtp_head import MtpHead
from specfx.train import lookup
from specfx.train.data import Text


def counting_model(vocab: int = VOCAB) -> Any:
    """A target that always writes the token of its last input plus 7: its layers add nothing, its LM head looks up the successor."""
    model = tiny_model("llama", vocab_size=vocab)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        embedding = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        model.lm_head.weight.copy_(embedding.roll(7, dims=0))
    return model.requires_grad_(False)


def counting_texts(count: int, seed: int = 0, vocab: int = VOCAB) -> list[Text]:
    pick = random.Random(seed)
    texts = []
    for number in range(count):
        prompt = [pick.randrange(vocab) for _ in range(pick.randint(1, 6))]
        output = [(prompt[-1] + 7 * i) % vocab for i in range(1, pick.randint(4, 20))]
        texts.append(Text(tuple(prompt), tuple(output), "odd" if number % 2 else "even"))
    return texts


def looked_up(model: Any, texts: list[Text], **options: Any) -> lookup.Lookup:
    return lookup.Lookup(texts, model.config.hidden_size, model.dtype).fill(model, 256, **options)


def unskilled(model: Any) -> MtpHead:
    """A fresh head whose projection knows nothing."""
    head = MtpHead.from_target(model)
    torch.manual_seed(5)
    with torch.no_grad():
        head.eh_proj.weight.normal_(std=0.05)
    return head


def random_head(model: Any, noise: float = 0.3, layers: int = 1) -> MtpHead:
    head = MtpHead.from_target(model)
    head.further.extend(MtpHead.from_target(model) for _ in range(layers - 1))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return head


def write(path: Path, texts: list[Text]) -> Path:
    path.write_text("".join(json.dumps({"prompt": t.prompt, "output": t.output, "category": t.category}) + "\n" for t in texts))
    return path
