"""Rewards that are neural networks: CLIP scorers, ImageReward, HPSv3.

Weights are read from safetensors only, from a folder or a hub repository, and loaded into
transformers' own model classes; the tensors of a checkpoint in its authors' layout are renamed for
that. Similarities and heads are computed in float32 whatever the model's dtype, because the images
of a group differ by less than bfloat16 resolves.
"""
