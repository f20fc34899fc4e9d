"""Rewards that are neural networks: CLIP scorers, ImageReward, HPSv3.

Weights are read from safetensors only, from a folder or a hub repository, and put into
transformers' own model classes; a checkpoint in its authors' layout is renamed on the way.
Similarities and heads are computed in float32 whatever the model's dtype, because a group's images
differ by less than bfloat16 resolves.
"""
