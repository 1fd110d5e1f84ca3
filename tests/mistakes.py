"""The catalogue of mistakes (minillama/exercises) as the tests plant it: each takes the place of a method's wrapper or
of its `attach`; where one makes no difference to a kind of model, its `harmless_for` says so."""

from minillama.adapters import bottleneck, ia3, llama_adapter, llama_adapter_v2, lora, prefix_tuning, prompt_tuning
from minillama.course.exercises.bottleneck import Adapted, Bottleneck, attach_to_mlp_only
from minillama.course.exercises.ia3 import IA3Linear, attach_before_activation, attach_to_queries
from minillama.course.exercises.llama_adapter import NormsOfTheBaseTrained, Prefix, ScaledLinear
from minillama.course.exercises.lora import LoRALinear
from minillama.course.exercises.prefix_tuning import PrefixAttention, PromptEmbedding

# (case in methods.CASES, module, the name that is replaced, by what)
MISTAKES = (
    [("llama_adapter", llama_adapter, "AdaptedAttention", mistake) for mistake in Prefix.__subclasses__()]
    + [("v2", llama_adapter_v2, "ScaledLinear", mistake) for mistake in ScaledLinear.__subclasses__()]
    + [("v2", llama_adapter_v2, "TrainedNorm", NormsOfTheBaseTrained)]
    + [("prefix_tuning", prefix_tuning, "PrefixAttention", mistake) for mistake in PrefixAttention.__subclasses__()]
    + [("prompt_tuning", prompt_tuning, "PromptEmbedding", mistake) for mistake in PromptEmbedding.__subclasses__()]
    + [("ia3", ia3, "IA3Linear", mistake) for mistake in IA3Linear.__subclasses__()]
    + [("ia3", ia3, "attach", mistake) for mistake in (attach_before_activation, attach_to_queries)]
    + [("lora", lora, "LoRALinear", mistake) for mistake in LoRALinear.__subclasses__()]
    + [("houlsby", bottleneck, "Bottleneck", mistake) for mistake in Bottleneck.__subclasses__()]
    + [("houlsby", bottleneck, "Adapted", mistake) for mistake in Adapted.__subclasses__()]
    + [("houlsby", bottleneck, "attach", attach_to_mlp_only)]
)
