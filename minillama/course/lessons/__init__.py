# ruff: noqa: F401  what it imports is for the notebooks
"""What the lessons share, `lessons.NAME` in a notebook, whichever file it stands in:

    from minillama.course import lessons
    run = lessons.adaptation("ia3", "fr", steps=100)      # a fresh base, adapted and measured
    runs = lessons.over_seeds("ia3", "fr", steps=100)     # the same from two seeds, side by side
    lessons.show(minillama.adapters.ia3.IA3Linear)        # its source, from the file

runs.py, looking.py and shown.py serve several lessons, each of the other files one.
"""

from .base_models import fresh_llama, parameters_of, shares_of_the_mean
from .bottleneck import drawn, fastest, only, seen_by_bottlenecks
from .comparison import facts, long_runs, side_by_side
from .ia3 import ia3_opened, ia3_vectors, shares_of_factors, starts_of_ia3
from .llama_adapter import gates_at, movement, projections_run, versions
from .looking import (
    attention_figure,
    attention_inputs,
    attention_weights,
    gate_slider,
    inputs_of,
    telling_example,
    turned,
)
from .lora import first_steps, lora_started, multiplications
from .prefix_tuning import counted, loss_curve, starts_table
from .real_model import BAD, GOOD, HELD_TEXTS, peft_answers, scored_pieces, smollm2, sweep, zero_init_runs
from .runs import adaptation, base, begun, distances, judged, mean_match, over_seeds, scaled
from .scaling_out import operations, rows_read, torchrun
from .sees import (
    encoder,
    exchanged,
    glances,
    is_date,
    own_digit,
    pad,
    read_alone,
    reading_figure,
    side_by_side_sighted,
    sighted,
    stored_runs,
    unseen,
)
from .shown import ROOT, matches_table, percent, show, table
