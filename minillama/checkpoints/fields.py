"""What a field of a model's configuration may be, whichever file says it: its type, and the bounds that are kept."""

from .files import believed, shortened

SLIDING, FULL = "sliding_attention", "full_attention"  # the two kinds of layers that layer_types knows

# The type of each field, and for numbers the least and the largest.
TYPES = {
    "vocab_size": (int, 1, 2**24),
    "hidden_size": (int, 1, 2**18),
    "intermediate_size": (int, 1, 2**20),
    "num_hidden_layers": (int, 1, 1024),
    "num_attention_heads": (int, 1, 2**12),
    "num_key_value_heads": (int, 1, 2**12),
    "head_dim": (int, 1, 2**12),
    "max_position_embeddings": (int, 1, 2**28),
    "sliding_window": (int, 1, 2**28),
    "max_window_layers": (int, 0, 1024),
    "sliding_window_pattern": (int, 1, 1024),
    "no_rope_layer_interval": (int, 1, 1024),
    "rms_norm_eps": (float, 1e-12, 1e-1),
    "layer_norm_eps": (float, 1e-12, 1e-1),
    "rope_theta": (float, 1.0, 1e12),
    "rope_local_base_freq": (float, 1.0, 1e12),
    "attention_bias": (bool,),
    "attention_output_bias": (bool,),
    "mlp_bias": (bool,),
    "tie_word_embeddings": (bool,),
    "use_sliding_window": (bool,),
    "embedding_multiplier": (float, 1e-6, 1e6),
    "residual_multiplier": (float, 1e-6, 1e6),
    "attention_multiplier": (float, 1e-6, 1e6),
    "logits_scaling": (float, 1e-6, 1e6),
    "query_pre_attn_scalar": (int, 1, 2**20),
    "factor": (float, 1.0, 1e6),
    "attention_factor": (float, 1e-3, 1e3),
    "mscale": (float, 0, 1e3),
    "mscale_all_dim": (float, 0, 1e3),
    "beta_fast": (float, 1e-3, 1e6),
    "beta_slow": (float, 1e-3, 1e6),
    "truncate": (bool,),
    "low_freq_factor": (float, 1e-3, 1e6),
    "high_freq_factor": (float, 1e-3, 1e6),
    "original_max_position_embeddings": (int, 2, 2**28),
}


def honest(field, value, key=None):
    """The value of a field of ours, where it is of the field's type and within its bounds; ValueError names the key."""
    return believed(key or field, value, *TYPES[field])


def listed(key, values, layers, known):
    """A list of config.json with an entry for each layer, as a tuple."""
    if not isinstance(values, list) or len(values) < layers or not all(value in known for value in values):
        raise ValueError(f"{key} is {shortened(values)}; needed is for each of {layers} layers one of {known}")
    return tuple(int(value) if isinstance(value, int) else value for value in values[:layers])


def factors(key, values):
    """A list of positive numbers, one for each pair of features, as a tuple."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} is {shortened(values)}; needed is a list of numbers")
    return tuple(float(believed(key, value, float, 1e-6, 1e6)) for value in values)
