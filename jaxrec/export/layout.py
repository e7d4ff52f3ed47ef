"""Where things lie in a bundle."""

USER_TOWER = "user_tower"
STABLEHLO = "stablehlo"  # one file a program, named as the program; and `sized_program`s
SAVED_MODEL = "saved_model/1"  # TensorFlow Serving wants a number below the model's directory
ONNX = "onnx"
ITEM_VECTORS_FILE, WEIGHTS_FILE = "item_vectors.safetensors", "weights.safetensors"
WEIGHT_FILES = (ITEM_VECTORS_FILE, WEIGHTS_FILE)
CONFIG_FILE, METRICS_FILE, CARD_FILE = "config.json", "metrics.json", "MODEL_CARD.md"

# What a server compiles the user tower for. It is written for each of these sizes and one platform, too: to put numbers
# in the place of letters and of the platform, JAX holds the interpreter, and with it every request.
SIZED_PLATFORM = "cpu"
BATCH_SIZES = (1, 4, 16)
SHORTEST_HISTORY = 32


def history_lengths(most: int) -> tuple[int, ...]:
    """Each twice as long as the one before, up to the longest that the model reads."""
    sizes = [SHORTEST_HISTORY]
    while sizes[-1] < most:
        sizes.append(sizes[-1] * 2)
    return (*(size for size in sizes if size < most), most)


def sized_program(name: str, num_rows: int, length: int) -> str:
    """The file of a program that takes just this many users and events, on `SIZED_PLATFORM`."""
    return f"{name}.{num_rows}x{length}"
