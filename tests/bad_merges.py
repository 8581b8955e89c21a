"""Merges that a server refuses, of adapters named by their kinds, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from grpc import StatusCode as Code

from loraplex_client import Adapters, MergeOptions

CAT = MergeOptions()
#: inputs, options, and what is answered
MERGES: Mapping[str, tuple[Adapters, MergeOptions, Code, tuple[str, ...]]] = {
    "no method": ("lora", MergeOptions(""), Code.INVALID_ARGUMENT, ("method '' is unknown", "dare_ties_svd")),
    "a method that nobody knows": ("lora", MergeOptions("mean"), Code.INVALID_ARGUMENT, ("method 'mean'",)),
    "an option of another method": ("lora", MergeOptions("linear", seed=3), Code.INVALID_ARGUMENT, ("seed 3 has no",)),
    "no density": ("lora", MergeOptions("ties"), Code.INVALID_ARGUMENT, ("density is missing",)),
    "too dense": ("lora", MergeOptions("ties", density=1.01), Code.INVALID_ARGUMENT, ("density 1.01 is outside",)),
    "a density of no size": ("lora", MergeOptions("ties", math.nan), Code.INVALID_ARGUMENT, ("density nan",)),
    "an unknown vote": ("lora", MergeOptions("ties", 0.5, "loud"), Code.INVALID_ARGUMENT, ("'loud' is unknown",)),
    "a rank of nobody": ("lora", MergeOptions("svd", svd_rank=33), Code.INVALID_ARGUMENT, ("svd_rank 33", "up to")),
    "no inputs": ("", CAT, Code.INVALID_ARGUMENT, ("inputs: is empty",)),
    "a weight of no size": ({"lora": math.nan}, CAT, Code.INVALID_ARGUMENT, ("inputs.weight: nan",)),
    "nothing but weights of 0": ({"lora": 0}, CAT, Code.INVALID_ARGUMENT, ("all have weight 0",)),
    "an input that is not there": (["lora", "lara"], CAT, Code.NOT_FOUND, ("'lara' is not loaded", "did you mean")),
    "an activated LoRA": (["lora", "alora"], CAT, Code.UNIMPLEMENTED, ("activated LoRA", "invocation tokens")),
    "two DoRAs": (["dora", "dora-too"], CAT, Code.UNIMPLEMENTED, ("magnitudes", "v_proj")),
    "a weighted head": ({"lora": 1, "head": 0.5}, CAT, Code.UNIMPLEMENTED, ("saved module", "'lm_head'")),
    "scales by another method": ({"ia3": 0.5}, MergeOptions("ties", 0.5), Code.UNIMPLEMENTED, ("scale", "k_proj")),
}

#: texts of recipes that are none, or may not be made
TEXTS: Mapping[str, tuple[str, Code]] = {
    "nothing": ("merge:", Code.INVALID_ARGUMENT),
    "no inputs": ('merge:{"inputs":[],"options":{"method":"cat"}}', Code.INVALID_ARGUMENT),
    "a directory of somebody else": (
        'merge:{"inputs":[{"name":"a","source":"/etc","uid":"","weight":1}],"options":{"method":"cat"}}',
        Code.PERMISSION_DENIED,
    ),
}
