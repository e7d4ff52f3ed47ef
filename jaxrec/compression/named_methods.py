"""The methods by the names that the command line takes; another one is one line here."""

from jaxrec.compression.methods import Method, Quantization
from jaxrec.compression.pruning import PrunedHeads, PrunedLayers

METHODS: dict[str, Method] = {
    "int8": Quantization(tables="int8", dense="int8"),
    "int8_activations": Quantization(tables="int8", dense="int8", products="int8"),
    "int4": Quantization(tables="int4", dense="int4"),
    "pq": Quantization(tables="product", dense="int8"),
    "pq_int4": Quantization(tables="product", dense="int4", part_dim=4),
    "pq_rescored": Quantization(tables="product", dense="int8", num_candidates=200),
    "pruned_heads": PrunedHeads(),
    "pruned_layers": PrunedLayers(),
}
