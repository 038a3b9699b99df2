"""Module attributes that forwards read and that follow the widths, beyond what the ops' own rules tell."""

from __future__ import annotations

from torch import nn

# The classes of the next two tables are known by name and by what they hold: an attribute counts where its value is
# that width, so that copies of diffusers' code are followed and other classes of the name aren't touched.

# class -> attributes that hold the number of channels of the module's input
INPUT_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "Upsample1D": ("channels",),
    "Upsample2D": ("channels",),
    "Downsample1D": ("channels",),
    "Downsample2D": ("channels",),
    "FirUpsample2D": ("channels",),
    "FirDownsample2D": ("channels",),
}


# class -> attribute -> (parameter below the module, dim) whose size it holds
PARAMETER_ATTRIBUTES: dict[str, dict[str, tuple[str, int]]] = {
    "Attention": {
        "query_dim": ("to_q.weight", 1),
        "inner_dim": ("to_q.weight", 0),
        "inner_kv_dim": ("to_k.weight", 0),
        "cross_attention_dim": ("to_k.weight", 1),
        "out_dim": ("to_out.0.weight", 1),  # the processors that read it (OmniGen, Cosmos) mean all heads together
    },
    "ResnetBlock2D": {"in_channels": ("conv1.weight", 1), "out_channels": ("conv2.weight", 0)},
    "Upsample2D": {"channels": ("conv.weight", 1), "out_channels": ("conv.weight", 0)},
    "Downsample2D": {"channels": ("conv.weight", 1), "out_channels": ("conv.weight", 0)},
    "CogView3PlusPatchEmbed": {"hidden_size": ("proj.weight", 0)},
    "Conv1D": {"nx": ("weight", 0), "nf": ("weight", 1)},  # transformers' linear layer of GPT-2, transposed
    "GPT2Attention": {"split_size": ("c_proj.weight", 0), "embed_dim": ("c_proj.weight", 0)},
    "SelfAttention1d": {"channels": ("value.weight", 0)},
    "AudioDiTAttention": {"inner_dim": ("to_q.weight", 0)},
    "MPNetSelfAttention": {"all_head_size": ("q.weight", 0)},
    "MixtralTopKRouter": {"hidden_dim": ("weight", 1)},
    **{n: {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)} for n in ("RNN", "LSTM", "GRU")},
    **{
        n: {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)} for n in ("RNNCell", "LSTMCell", "GRUCell")
    },
}


# class -> why its parameters stay
FROZEN_CLASSES: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "torch.nn.MultiheadAttention insists on square projections",
}


# Attributes of attention modules that hold a number of heads.
HEAD_ATTRIBUTES = (
    "heads",
    "kv_heads",
    "n_head",
    "n_heads",
    "nheads",
    "num_attention_heads",
    "num_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "sliceable_head_dim",
)


# … and those that hold the dims of a head.
DIM_ATTRIBUTES = ("attention_head_dim", "dim_head", "head_dim", "head_size")
