"""Where things lie in a bundle."""

STABLEHLO = "stablehlo"  # one file a program, named as the program
SAVED_MODEL = "saved_model/1"  # TensorFlow Serving wants a number below the model's directory
ONNX = "onnx"
ITEM_VECTORS_FILE, WEIGHTS_FILE = "item_vectors.safetensors", "weights.safetensors"
WEIGHT_FILES = (ITEM_VECTORS_FILE, WEIGHTS_FILE)
CONFIG_FILE, METRICS_FILE, CARD_FILE = "config.json", "metrics.json", "MODEL_CARD.md"
